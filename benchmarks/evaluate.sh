#!/usr/bin/env bash
# A model's whole built-in suite on one GPU: `mixquant eval`, one process a task, since decoding waits for launches.
#   benchmarks/evaluate.sh OUT [MODEL] [LIMIT]     writes OUT/MODEL.json; run again, it resumes
# The journals are then one journal, and the last command finds nothing left to run: it writes what it would have
# written by itself. A batch is an eighth of a rung's 1,002 examples, so that five processes fit a GPU of 80 GB.
set -eu
out=$1 model=${2:-demo} limit=${3:-334}
name=$(basename "$model")
work=$out/journals-$name
mkdir -p "$work"
evaluate() {
  tasks=$1
  shift
  OMP_NUM_THREADS=2 python3 -c 'from mixquant.cli import main; main()' eval "$model" --device cuda --tasks "$tasks" \
    --limit "$limit" --batch-size 126 "$@"
}
pids=()
for task in lookup multihop arithmetic toolcall retrieval; do
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True evaluate "$task" -o "$work/$task.json" &
  pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
echo "$name: all answers after $SECONDS s"
python3 - "$work" "$name.jsonl" <<'MERGE'
import json, pathlib, sys
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
TASKS = "lookup multihop arithmetic toolcall retrieval".split()
parts = [(folder / f"{task}.jsonl").read_text().split("\n", 1) for task in TASKS]
headers = [json.loads(header)["run"] for header, _ in parts]
examples = {task: digest for header in headers for task, digest in header["examples"].items()}
run = headers[0] | {"suites": ["agent", "retrieval"], "examples": examples}
(folder / name).write_text(json.dumps({"run": run}) + "\n" + "".join(lines for _, lines in parts))
MERGE
evaluate agent,retrieval --layers -o "$work/$name.json"
echo "$name: results after $SECONDS s"
cp "$work/$name.json" "$out"
