#!/usr/bin/env bash
# What made the results of a CUDA machine: the CUDA tests, cpu.py on its CPU, and the ladder, one process a task.
#   benchmarks/h200.sh OUT       writes tests.txt, cpu.txt, ladder.md and log.txt into the folder OUT
set -u
out=$1
parts=$(mktemp -d)
export PYTHONPATH=src:. PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
last=$(($(nproc) - 1))
taskset -c "$last" python3 benchmarks/cpu.py --rounds 7 >"$out/cpu.txt" 2>>"$out/log.txt" &
for task in lookup multihop arithmetic toolcall; do
  OMP_NUM_THREADS=2 taskset -c "0-$((last - 1))" python3 benchmarks/ladder.py --device cuda --n 200 --batch 200 \
    --arms bf16,uniform-nvfp4,nvfp4,uniform-fp8,fp8 --tasks "$task" >"$parts/$task.md" 2>>"$out/log.txt" &
done
OMP_NUM_THREADS=2 python3 -m pytest -q -p no:cacheprovider tests/kernels/test_cuda.py >"$out/tests.txt" 2>&1
wait
cp "$parts/lookup.md" "$out/ladder.md"
grep -hE '^\| (multihop|arithmetic|toolcall|\|)' "$parts"/{multihop,arithmetic,toolcall}.md >>"$out/ladder.md"
tail -n 3 "$out/tests.txt"
cat "$out/cpu.txt" "$out/ladder.md"
