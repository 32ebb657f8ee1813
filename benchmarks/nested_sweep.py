"""Which shape of which kernel is fastest for a nested weight: every sensible one, against cuBLAS BF16, in CUDA graphs.

    python benchmarks/nested_sweep.py OUT                     # one Hopper GPU, 32 cores: 30 s
    python benchmarks/nested_sweep.py OUT --seconds 60        # stop measuring then; least promising shapes come last
    python benchmarks/nested_sweep.py OUT --compile-only      # no GPU: how many, and whether they spill

What the tables `FEW` and `MANY` of kernels/nested_cuda.py hold was chosen from its output. Kernels are compiled side by
side. A child process measures, line by line into OUT/sweep.jsonl; one that hangs or fails is ended, its kernel noted,
and the next child goes on behind it. The error is that against float64, over cuBLAS's: more than 1.05 is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.nested_linear import COPIES, SHAPES, capture, distance, nest, random_weight, replay
from mixquant.kernels import nvrtc
from mixquant.kernels.nested_cuda import Few, Launch, Many, sources

ROUNDS, MULTIPROCESSORS = 7, 132

FEW = {
    8: [(1, 1, 1, 16), (1, 1, 1, 8)],
    16: [(2, 1, 1, 12), (2, 1, 1, 8), (2, 1, 1, 6), (2, 2, 1, 8), (2, 2, 1, 12), (2, 2, 2, 6)],
    32: [(4, 2, 1, 12), (4, 2, 2, 2), (4, 2, 2, 6), (4, 1, 1, 12), (4, 1, 1, 8)],
}
MANY = {  # rows: groups, stages
    16: [(3, 9), (2, 7)],
    32: [(3, 8), (3, 9), (2, 6)],
    64: [(3, 7), (3, 8)],
    128: [(3, 5), (3, 6)],
    256: [(2, 4), (2, 5)],
    512: [(2, 4), (2, 5)],
}
SPLITS = (1, 2, 3, 4, 5, 6, 8)


def tasks() -> list[tuple[int, str, Few | Many]]:
    """(rows of x, layer, shape), the most promising first."""
    found = []
    for rows, layer in itertools.product(MANY, SHAPES):
        n, k = SHAPES[layer]
        candidates = [(efficiency(rows, n, k, many), many) for many in shapes(rows)]
        best = sorted((c for c in candidates if c[0] > 0.55), reverse=True)[:12]
        found += [(rank, rows, layer, many) for rank, (_, many) in enumerate(best)]
    for rows, layer in itertools.product(FEW, SHAPES):
        found += [(rank, rows, layer, Few(*few)) for rank, few in enumerate(FEW[rows])]
    found.sort(key=lambda task: (task[0] // 6, task[1], task[2]))
    return [task[1:] for task in found]


def shapes(rows: int) -> Iterator[Many]:
    for (groups, stages), split in itertools.product(MANY[rows], SPLITS):
        yield Many(min(rows, 256), groups, split, stages)


def efficiency(rows: int, n: int, k: int, many: Many) -> float:
    """How much of the multiprocessors' time is work, if a CTA takes four blocks of columns to begin and to end."""
    launch = many.launch(rows, n)
    room = MULTIPROCESSORS * many.beside
    waves = math.ceil(math.prod(launch.grid) / room)
    blocks = math.ceil(k / 64 / many.split)
    work = n / 64 * k / 64 * launch.grid[1]
    return work / (waves * (blocks + 4) * room * many.groups)


def compile_all(names: list[str], out: Path) -> dict[str, nvrtc.Compiled]:
    with ProcessPoolExecutor() as pool:
        compiled = dict(zip(names, pool.map(compile_one, names, chunksize=2), strict=True))
    (out / "kernels.pickle").write_bytes(pickle.dumps(compiled))
    return compiled


def compile_one(name: str) -> nvrtc.Compiled:
    os.environ["CUDA_CACHE_DISABLE"] = "1"  # what comes from NVRTC's cache has no word of spills
    return nvrtc.compile_source(sources("sm_90a"), [name], "sm_90a")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.child is not None:
        return measure(args.out, args.child)
    began = time.monotonic()
    names = sorted({shape.name for _, _, shape in tasks()})
    compiled = compile_all(names, args.out)
    spills = {name: spilled for name in names if (spilled := max(s for _, s in compiled[name].resources().values()))}
    took = time.monotonic() - began
    print(f"{len(tasks())} measurements of {len(names)} kernels, compiled in {took:.0f} s; {spills=}", flush=True)
    if not args.compile_only:
        supervise(args.out, began + args.seconds)
        report(args.out)
    (args.out / "kernels.pickle").unlink()


def supervise(out: Path, deadline: float) -> None:
    """Children that measure, each from where the one before it stopped."""
    lines, first = out / "sweep.jsonl", 0
    lines.write_text("")
    while first < len(tasks()) and time.monotonic() < deadline:
        child = subprocess.Popen([sys.executable, __file__, str(out), "--child", str(first)])
        seen, since, begun = "", time.monotonic(), False
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            if (now := lines.read_text()) != seen:
                seen, since, begun = now, time.monotonic(), True
            elif time.monotonic() - since > (6 if begun else 45):
                break
        ended = child.poll()
        child.kill()
        child.wait()
        if ended == 0 or time.monotonic() >= deadline:
            return
        last = [json.loads(line) for line in lines.read_text().splitlines()]
        print(f"lost a process (exit {ended}) at {last[-1] if last else 'its start'}", flush=True)
        first = max((line["task"] for line in last), default=len(tasks())) + 1


def measure(out: Path, first: int) -> None:
    """Every task from the first on: one line before it runs, one with what it took."""
    compiled: dict[str, nvrtc.Compiled] = pickle.loads((out / "kernels.pickle").read_bytes())
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    dense = {layer: [random_weight(*shape) for _ in range(COPIES)] for layer, shape in SHAPES.items()}
    kernels = {layer: [nest(weight) for weight in weights] for layer, weights in dense.items()}
    modules: dict[str, nvrtc.Module] = {}
    baselines: dict[tuple[int, str], tuple[Any, ...]] = {}

    def baseline(rows: int, layer: str) -> tuple[Any, ...]:
        x = torch.randn(rows, SHAPES[layer][1], device=device, dtype=torch.bfloat16)
        truth = x.double() @ dense[layer][0].double().T
        error = distance(torch.nn.functional.linear(x, dense[layer][0]), truth)
        graph = capture(lambda: [torch.nn.functional.linear(x, weight) for weight in dense[layer]])
        return x, truth, error, statistics.median(replay(graph) for _ in range(2 * ROUNDS)) / COPIES

    with (out / "sweep.jsonl").open("a") as file:
        for number, (rows, layer, shape) in enumerate(tasks()[first:], first):
            line: dict[str, Any] = {"task": number, "rows": rows, "layer": layer, "kernel": shape.name}
            print(json.dumps(line), file=file, flush=True)
            if (rows, layer) not in baselines:
                baselines[rows, layer] = baseline(rows, layer)
            x, truth, error, line["bf16_us"] = baselines[rows, layer]
            if shape.name not in modules:
                modules[shape.name] = nvrtc.Module(compiled[shape.name], device)
            module = modules[shape.name]
            outs = [x.new_full((rows, SHAPES[layer][0]), torch.nan) for _ in range(COPIES)]
            launch = shape.launch(rows, SHAPES[layer][0])

            def work(
                launch: Launch = launch,
                outs: list[torch.Tensor] = outs,
                x: torch.Tensor = x,
                layer: str = layer,
                module: nvrtc.Module = module,
            ) -> None:
                for kernel, result in zip(kernels[layer], outs, strict=True):
                    kernel.start(launch, module, x, result, None)

            try:
                graph = capture(work)
            except RuntimeError as failed:  # such as a cluster that the GPU has no room for
                print(f"{shape.name}: {failed}", flush=True)
                torch.cuda.synchronize()  # a broken context ends this process here
                continue
            line["us"] = statistics.median(replay(graph) for _ in range(ROUNDS)) / COPIES
            line["error"] = distance(outs[0], truth) / error
            print(json.dumps(line), file=file, flush=True)


def report(out: Path) -> None:
    """The best three of each row and layer."""
    lines = [json.loads(line) for line in (out / "sweep.jsonl").read_text().splitlines()]
    right = [line for line in lines if "us" in line and line["error"] < 1.05]
    wrong = {line["kernel"] for line in lines if "us" in line and not line["error"] < 1.05}
    print(f"{len(right)} right, wrong: {sorted(wrong)}")
    for rows in sorted({line["rows"] for line in right}):
        total = [0.0, 0.0]
        for layer in SHAPES:
            found = sorted((x for x in right if x["rows"] == rows and x["layer"] == layer), key=lambda x: x["us"])
            if not found:
                continue
            best = ", ".join(f"{x['us']:.1f} {x['kernel']}" for x in found[:3])
            print(f"{rows:4} {layer:8} cuBLAS {found[0]['bf16_us']:6.1f} | {best}")
            total = [total[0] + found[0]["bf16_us"], total[1] + found[0]["us"]]
        print(f"{rows:4} all      cuBLAS {total[0]:6.1f} | {total[1]:.1f}: {total[1] / total[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
