#!/usr/bin/env bash
# What the results of benchmarks/results/ from a CUDA machine were made by: tests, CPU benchmark, ladder. Usage: h200.sh OUT
set -u
out=$1
export PYTHONPATH=src:. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
cores=$(nproc)
last=$((cores - 1))
taskset -c "$last" python3 benchmarks/cpu.py --rounds 7 >"$out/cpu.txt" 2>"$out/cpu.log" &
for task in lookup multihop arithmetic toolcall; do
  OMP_NUM_THREADS=2 taskset -c "0-$((last - 1))" python3 benchmarks/ladder.py --device cuda --n 200 --batch 200 \
    --arms bf16,uniform-nvfp4,nvfp4,uniform-fp8,fp8 --tasks "$task" >"$out/ladder-$task.md" 2>"$out/ladder-$task.log" &
done
OMP_NUM_THREADS=2 python3 -m pytest -q -p no:cacheprovider tests/kernels/test_cuda.py >"$out/tests.txt" 2>&1
tail -n 15 "$out/tests.txt"
wait
cat "$out/cpu.txt" "$out"/ladder-*.md
