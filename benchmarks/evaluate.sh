#!/usr/bin/env bash
# The demo model's report: its prefill weights by `mixquant quantize`, then `mixquant eval` of the whole built-in suite on
# one GPU, one process a task, since decoding waits for launches.
#   benchmarks/evaluate.sh OUT [LIMIT]     writes OUT/results.json, and OUT/short.json of the rungs up to 1,100 tokens;
# run again, it resumes.
# A batch is an eighth of a rung's 1,002 examples, so that five processes fit a GPU of 80 GB.
set -eu
tasks=(lookup multihop arithmetic toolcall retrieval)
merge=$(realpath "$(dirname "$0")/merge.py") limit=${2:-334}
mkdir -p "$1"
cd "$1"
mixquant() { OMP_NUM_THREADS=2 python3 -c 'from mixquant.cli import main; main()' "$@"; }
[ -d demo-nvfp4 ] || mixquant quantize demo -o demo-nvfp4 --device cuda
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
pids=()
for task in "${tasks[@]}"; do
  mixquant eval demo-nvfp4 --device cuda --tasks "$task" --limit "$limit" --batch-size 126 -o "$task.json" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
python3 "$merge" results.json "$SECONDS" "benchmarks/evaluate.sh OUT" "${tasks[@]/%/.jsonl}"
python3 "$merge" short.json --short 1100 "$SECONDS" "benchmarks/evaluate.sh OUT" "${tasks[@]/%/.jsonl}"
