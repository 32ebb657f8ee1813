"""What an engine of vLLM takes and what it leaves: loading, CUDA graphs and KV cache, in vLLM's own words.

    python benchmarks/vllm_memory.py OUT SHAPE ARM ...     # one GPU; a minute an arm; SHAPE: of benchmarks/shapes.py

ARM is `bf16`, `vllm:fp8`, or a policy of mixquant such as `fp8` or `fp8,storage=separate`. Engines start one after
another, each alone on the GPU, with dummy weights and vLLM's own defaults but for a context of 33,024 tokens. OUT keeps
a log of each, and the table as memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks import shapes
from mixquant.policy import METHOD, Policy

SAID = {
    "model, GiB": r"Model loading took ([\d.]+) GiB",
    "loading, s": r"Model loading took .* and ([\d.]+) seconds",
    "graphs estimated, GiB": r"(?:Estimated CUDA graph memory:|mixquant: CUDA graphs will take) ([\d.]+) GiB",
    "graphs, GiB": r"Graph capturing finished in .* took (-?[\d.]+) GiB",
    "capturing, s": r"Graph capturing finished in ([\d.]+) secs",
    "KV cache, tokens": r"GPU KV cache size: ([\d,]+) tokens",
}
SAMPLES = r"Estimated (\w+ CUDA graph memory: .* per-graph)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("shape", choices=shapes.SHAPES)
    parser.add_argument("arms", nargs="*", default=["bf16", "vllm:fp8", "fp8", "fp8,storage=separate"])
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.out / args.shape
    if args.start:
        return start(folder, args.start)
    args.out.mkdir(parents=True, exist_ok=True)
    shapes.write(args.shape, folder)
    table: dict[str, dict[str, str]] = {}
    print("| arm | " + " | ".join(SAID) + " |\n" + "|---" * (len(SAID) + 1) + "|")
    for arm in args.arms:
        table[arm] = row(args, arm)
        print(f"| {arm} | " + " | ".join(table[arm].get(name, "–") for name in SAID) + " |", flush=True)
        (args.out / "memory.json").write_text(json.dumps(table, indent=1))


def row(args: argparse.Namespace, arm: str) -> dict[str, str]:
    """Start an engine in a process of its own, and read what it says."""
    log = args.out / f"{re.sub('[^a-z0-9]+', '-', arm)}.log"
    command = [sys.executable, "-m", "benchmarks.vllm_memory", str(args.out), args.shape, "--start", arm]
    with log.open("w") as file:
        failed = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"VLLM_LOGGING_LEVEL": "DEBUG"}
        )
    text = log.read_text()
    if failed.returncode:
        print(f"{arm} did not start: {log}", flush=True)
    for sample in re.findall(SAMPLES, text):
        print(f"{arm}: {sample}", flush=True)
    return {name: found[-1] for name, pattern in SAID.items() if (found := re.findall(pattern, text))}


def start(folder: Path, arm: str) -> None:
    """An engine that starts, and ends."""
    from vllm import LLM

    from mixquant.integrations.vllm import register

    register()  # where mixquant runs from a checkout, no entry point does it
    options: dict[str, Any] = {}
    if arm.startswith("vllm:"):
        options["quantization"] = arm.removeprefix("vllm:")
    elif arm != "bf16":
        policy = Policy.parse(arm).to_dict()
        del policy["tail"]  # the engine's default, by which it chooses its graphs
        options["hf_overrides"] = {"quantization_config": {"quant_method": METHOD, **policy}}
    LLM(str(folder), skip_tokenizer_init=True, load_format="dummy", max_model_len=33024, seed=0, **options)
    for child in psutil.Process().children(recursive=True):  # engines need half a minute to take leave by themselves
        child.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
