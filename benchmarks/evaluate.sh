#!/usr/bin/env bash
# The demo model's report: its prefill weights by `mixquant quantize`, then `mixquant eval` of the whole built-in suite on
# one GPU, one process a task, since decoding waits for launches.
#   benchmarks/evaluate.sh OUT [LIMIT]     writes OUT/results.json; run again, it resumes
# The journals are then one journal, and the last command finds nothing left to run: it writes what it would have
# written by itself. A batch is an eighth of a rung's 1,002 examples, so that five processes fit a GPU of 80 GB.
set -eu
limit=${2:-334}
mkdir -p "$1"
cd "$1"
mixquant() { OMP_NUM_THREADS=2 python3 -c 'from mixquant.cli import main; main()' "$@"; }
evaluate() {
  tasks=$1
  shift
  mixquant eval demo-nvfp4 --device cuda --tasks "$tasks" --limit "$limit" --batch-size 126 "$@"
}
[ -d demo-nvfp4 ] || mixquant quantize demo -o demo-nvfp4 --device cuda
echo "quantized after $SECONDS s"
pids=()
for task in lookup multihop arithmetic toolcall retrieval; do
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True evaluate "$task" -o "$task.json" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
echo "all answers after $SECONDS s"
python3 - <<'MERGE'
import json, pathlib
TASKS = "lookup multihop arithmetic toolcall retrieval".split()
parts = [pathlib.Path(f"{task}.jsonl").read_text().split("\n", 1) for task in TASKS]
headers = [json.loads(header)["run"] for header, _ in parts]
examples = {task: digest for header in headers for task, digest in header["examples"].items()}
run = headers[0] | {"suites": ["agent", "retrieval"], "examples": examples}
pathlib.Path("results.jsonl").write_text(json.dumps({"run": run}) + "\n" + "".join(lines for _, lines in parts))
MERGE
evaluate agent,retrieval --layers -o results.json
echo "results after $SECONDS s"
