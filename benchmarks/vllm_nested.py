"""Nested weights inside stock vLLM against stock BF16 and two copies: memory, loading, decode step, first token.

    python benchmarks/vllm_nested.py OUT                  # one GPU of 139 GiB with FP8: four minutes
    python benchmarks/vllm_nested.py OUT --size tiny      # a CPU: does it run

Three engines of a model of Qwen3-8B's shape with dummy weights start side by side, share the GPU and take turns within
each round; one that does not start is left out, and said. OUT holds the table (vllm-nested.json, saved after every row)
and what the engines say (engines.log), of which vLLM's own line "Model loading took" is printed. Engines that load at
once wait for each other: their seconds compare with each other only. `held` is what the engine's process has of the GPU
once it is ready, but for its KV cache; `peak` the most that it ever had, KV cache included; `kv` what nine tenths of
the GPU would leave to it alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import shapes
from benchmarks.vllm_phases import Bench, decode_step, fresh, seconds

PHASE = {"quant_method": "mixquant", "prefill": "fp8"}
ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "two copies": {"hf_overrides": {"quantization_config": PHASE | {"storage": "separate"}}},
    "nested": {"hf_overrides": {"quantization_config": PHASE | {"storage": "nested"}}},
}
BATCHES = (1, 8, 32, 64, 128)
PROMPTS = {"8b": (2048, 8192, 32768), "tiny": (64, 128)}
KV_BYTES = {"8b": 12 << 30, "tiny": 1 << 28}
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", choices=("8b", "tiny"), default="8b")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--seconds", type=float, default=235, help="begin no row after so many")
    args = parser.parse_args()
    began = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    say = keep_logs_apart(args.out / "engines.log")
    watch = Watch(args.out / "memory.csv")
    folder = args.out / "model"
    shapes.write(args.size, folder)
    names = args.engines.split(",")
    with ThreadPoolExecutor(len(names)) as pool:
        started = dict(zip(names, pool.map(functools.partial(try_start, folder, args.size), names), strict=True))
    for name, found in started.items():
        if isinstance(found, Exception):
            say(f"{name} did not start: {str(found).splitlines()[0][:300]}")
    engines = {name: found for name, found in started.items() if not isinstance(found, Exception)}
    document: dict[str, Any] = {"torch": torch.__version__, "rounds": args.rounds, "memory": [], "rows": []}
    document["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    ready = time.monotonic() - began
    say(f"{document['device']}, torch {torch.__version__}; {', '.join(engines)} ready in {ready:.0f} s")
    save = functools.partial(write, args.out / "vllm-nested.json", document)
    for name, llm in engines.items():
        document["memory"].append({"arm": name, **memory(llm, args, watch)})
        say("  ".join(f"{key} {value}" for key, value in document["memory"][-1].items()))
        save()
    bench = Bench(engines, {name: (name, None) for name in engines}, args.rounds, say)
    say(f"| ms, median of {args.rounds} | " + " | ".join(engines) + " | ratios to the first |")
    say("|---" * (len(engines) + 2) + "|")
    work = []
    for batch in BATCHES:
        prompts = fresh(batch, 256 if args.size == "8b" else 32)
        work.append((f"decode step, batch {batch}", lambda llm, p=prompts: decode_step(llm, p)))
    work += [(f"TTFT, {n} tokens", lambda llm, n=n: seconds(llm, fresh(1, n), 1)) for n in PROMPTS[args.size]]
    for name, measure in work:
        if time.monotonic() - began < args.seconds:
            document["rows"].append(bench.row(name, measure))
            save()
    say(f"{time.monotonic() - began:.0f} s in all")
    for child in psutil.Process().children(recursive=True):  # engines need half a minute to take leave by themselves
        child.kill()
    os._exit(0)


def keep_logs_apart(path: Path) -> Any:
    """Send what this process and its children say into a file; return what prints to the terminal as before."""
    terminal = os.fdopen(os.dup(1), "w")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    sys.stdout.flush()
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    return functools.partial(print, file=terminal, flush=True)


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1))


class Watch:
    """What nvidia-smi says of the GPU's memory ten times a second, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits", "-lms", "100"]
        if shutil.which("nvidia-smi"):  # another process: vLLM forks, and threads do not survive that
            subprocess.Popen(query, stdout=path.open("w"), stderr=subprocess.DEVNULL)

    def of(self, pid: int) -> list[int]:
        """Bytes that a process had, from first to last."""
        text = self.path.read_text() if self.path.exists() else ""
        return [int(used) << 20 for used in re.findall(rf"^{pid}, (\d+)$", text, re.MULTILINE)]


def memory(llm: Any, args: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """What vLLM says of an engine's loading, and what its process has of the GPU."""
    pid, allocated, reserved = llm.collective_rpc(facts)[0]
    said = re.findall(
        rf"pid={pid}\).*Model loading took ([\d.]+) GiB.* and ([\d.]+) seconds", (args.out / "engines.log").read_text()
    )
    loaded, took = (float(value) for value in said[-1]) if said else (None, None)
    found = {"loading_gib": loaded, "loading_s": took, "peak_allocated_gib": allocated, "peak_reserved_gib": reserved}
    if used := watch.of(pid):
        held = used[-1] - KV_BYTES[args.size]
        total = torch.cuda.get_device_properties(0).total_memory
        found |= {"held_gib": held / GIB, "peak_gib": max(used) / GIB, "kv_gib": (0.9 * total - held) / GIB}
    return {key: round(value, 2) if value is not None else None for key, value in found.items()}


def facts(worker: Any) -> tuple[int, float, float]:
    """Of a worker: its process, and the most that torch's allocator has given out and has taken, in GiB."""
    if not torch.cuda.is_available():
        return os.getpid(), 0.0, 0.0
    return os.getpid(), torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB


def try_start(folder: Path, size: str, name: str) -> Any:
    """An engine with vLLM's own defaults but for the batch's size and the memory share; or why there is none."""
    from vllm import LLM

    sizes = {"max_model_len": 33024, "max_num_batched_tokens": 8192} if size == "8b" else {"max_model_len": 1024}
    eager = {} if torch.cuda.is_available() else {"enforce_eager": True}
    try:
        return LLM(
            str(folder), skip_tokenizer_init=True, load_format="dummy", gpu_memory_utilization=0.28, max_num_seqs=256,
            enable_prefix_caching=True, seed=0, kv_cache_memory_bytes=KV_BYTES[size], **sizes, **eager, **ENGINES[name],
        )  # fmt: skip
    except Exception as error:  # the other arms go on
        return error


if __name__ == "__main__":
    main()
