#!/usr/bin/env bash
# What an owner of a Blackwell GPU runs: twenty minutes at most, and nothing is sent by itself.
#   benchmarks/blackwell.sh MODEL OUT                  NVFP4: RTX 50, B200, B300, DGX Spark
#   benchmarks/blackwell.sh MODEL OUT --prefill fp8    FP8 in NVFP4's place: Hopper, Ada
# MODEL is a BF16 folder, a hub id or demo. OUT gets blackwell.json, report.md (which says what to send, and where) and
# log.txt. Needs mixquant with vLLM: pip install '.[vllm]' in a checkout.
set -eu
cd "$(dirname "$0")/.."
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.blackwell "$@"
