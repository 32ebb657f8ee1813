#!/usr/bin/env bash
# A pair of servers on two GPUs against two engines of each other kind, under the same load; about five minutes.
#   benchmarks/pair.sh OUT                 two GPUs joined by NVLink, vLLM and nixl
#   benchmarks/pair.sh OUT --size demo     its smallest form, on a CPU
# OUT gets pair.json (after every row), pair.md (the tables) and a log for each engine.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "$1"
export PYTHONPATH=src:.${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if ! "${PYTHON:-python3}" -c 'from importlib.metadata import version; version("mixquant")' 2>/dev/null; then
    # A checkout that is not installed: vLLM finds plugins by their metadata.
    info=$(mktemp -d)/mixquant-0.dist-info
    mkdir "$info"
    printf 'Metadata-Version: 2.1\nName: mixquant\nVersion: 0\n' >"$info/METADATA"
    printf '[vllm.general_plugins]\nmixquant = mixquant.integrations.vllm:register\n' >"$info/entry_points.txt"
    PYTHONPATH+=:$(dirname "$info")
fi
exec "${PYTHON:-python3}" -m benchmarks.pair "$@"
