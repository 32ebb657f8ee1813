#!/bin/sh
# What `mixquant bench` says of Qwen3-8B's shape with dummy weights, on one GPU of 139 GiB: arms; agents; tails; and
# from how many new tokens on a prompt gains by being quantized, which is what `min_prompt` is by default.
#
#   benchmarks/vllm_bench.sh OUT [SHAPE]        # results in OUT; SHAPE: of benchmarks/shapes.py
set -eu
OUT=$1 SHAPE=${2:-8b}
W=benchmarks/workloads
PYTHON=${PYTHON:-python3} status=0
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
[ -d "$OUT/$SHAPE" ] || $PYTHON -m benchmarks.shapes "$SHAPE" "$OUT/$SHAPE"
bench() { $PYTHON -m mixquant bench "$OUT/$SHAPE" --load-format dummy --prefill fp8 "$@" || status=$?; }
copies=copies=fp8,storage=separate # beside `phase`, which nests on Hopper
bench --arms bf16,vllm:fp8,phase --arm $copies --workload "$W/prompts.json,$W/decode.json,$W/crowd.json" -o "$OUT/arms.json"
bench --arms bf16,vllm:fp8,phase --arm $copies --workload "$W/agent.json" -o "$OUT/agent.json"
tails=""
for tail in 0 1 4 16 32 64 128; do tails="$tails --arm tail$tail=fp8,tail=$tail"; done
bench --arms bf16,uniform $tails --workload "$W/tails.json" -o "$OUT/tails.json"
precise="" # prompts of these lengths: all quantized, or none, on one copy and on two
for storage in auto separate; do
  for least in 0 512; do precise="$precise --arm $storage$least=fp8,storage=$storage,min_prompt=$least"; done
done
bench --arms bf16,vllm:fp8 $precise --workload "$W/short.json" -o "$OUT/short.json"
exit $status
