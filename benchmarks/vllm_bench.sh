#!/bin/sh
# What `mixquant bench` says of Qwen3-8B's shape with dummy weights, on one GPU of 139 GiB: arms, then tails.
#
#   benchmarks/vllm_bench.sh OUT [SHAPE]        # results and reports in OUT; SHAPE: of benchmarks/shapes.py
set -eu
OUT=$1 SHAPE=${2:-8b}
W=benchmarks/workloads
PYTHON=${PYTHON:-python3} status=0
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
$PYTHON -m benchmarks.shapes "$SHAPE" "$OUT/$SHAPE"
$PYTHON -m mixquant bench "$OUT/$SHAPE" --load-format dummy --prefill fp8 --arms bf16,vllm:fp8 \
    --arm nested=fp8,storage=nested --workload "$W/prompts.json,$W/decode.json,$W/agent.json" -o "$OUT/arms.json" || status=$?
tails="" nested=""
for tail in 0 1 4 16 64 128; do tails="$tails --arm tail$tail=fp8,tail=$tail"; done
for tail in 0 1 16 32 64 128; do nested="$nested --arm nested-tail$tail=fp8,storage=nested,tail=$tail"; done
$PYTHON -m mixquant bench "$OUT/$SHAPE" --load-format dummy --prefill fp8 --arms bf16,uniform,phase $tails $nested \
    --workload "$W/tails.json" -o "$OUT/tails.json" || status=$?
exit $status
