"""Products with nested weights against cuBLAS BF16: the linear layers of one Qwen3-8B decoder layer, in CUDA graphs.

    python benchmarks/nested_linear.py                # one GPU with FP8; a minute
    python benchmarks/nested_linear.py --json FILE

Each graph multiplies by four different weights of one shape, more than the L2 cache holds. The two arms take turns in
each round, so both see the same clocks; times are medians over the rounds, in microseconds for one product. The error
is that against float64, over cuBLAS's: at 1.00 only the order of the sum differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mixquant.kernels.nested_cuda import NestedCUDA
from mixquant.kernels.nested_split import split

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
COPIES = 4
TARGETS = {1: 0.80, 4: 0.80, 8: 0.80, 16: 0.80, 32: 0.85, 64: 0.95, 128: 1.0, 256: 1.03}
"""What nested weights are asked to reach: the most of cuBLAS's time, by rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    dense = {name: [random_weight(*shape) for _ in range(COPIES)] for name, shape in SHAPES.items()}
    kernels = {name: [nest(weight) for weight in weights] for name, weights in dense.items()}
    held = sum(tensor.nbytes for group in kernels.values() for kernel in group for tensor in kernel.tensors())
    whole = sum(weight.nbytes for group in dense.values() for weight in group)
    print(f"{device}, torch {torch.__version__}, memory {held / whole:.3f} of BF16\n")
    print("| rows | layer | cuBLAS BF16 | nested | ratio | error |\n|---|---|---|---|---|---|")
    rows = []
    for count in ROWS:
        layer = [measure(count, name, dense[name], kernels[name], args.rounds) for name in SHAPES]
        rows += layer
        total = {key: sum(row[key] for row in layer) for key in ("bf16_us", "nested_us")}
        ratio = total["nested_us"] / total["bf16_us"]
        asked = f" (asked: {TARGETS[count]:.2f})" if count in TARGETS else ""
        print(
            f"| **{count}** | **all** | {total['bf16_us']:.1f} | {total['nested_us']:.1f} | **{ratio:.2f}**{asked} | |",
            flush=True,
        )
        rows.append({"rows": count, "layer": "all", **total})
    if args.json:
        document = {"device": device, "torch": torch.__version__, "memory": held / whole}
        args.json.write_text(json.dumps(document | {"rows": rows}, indent=1))


def measure(
    count: int, name: str, dense: list[Tensor], kernels: list[NestedCUDA], rounds: int
) -> dict[str, float | int | str]:
    """One line of the table."""
    n, k = dense[0].shape
    x = torch.randn(count, k, device="cuda", dtype=torch.bfloat16)
    bf16 = capture(lambda: [torch.nn.functional.linear(x, weight) for weight in dense])
    ours = capture(lambda: [kernel(x, None) for kernel in kernels])
    times = [(replay(bf16), replay(ours)) for _ in range(rounds)]
    bf16_us, nested_us = (statistics.median(column) / COPIES for column in zip(*times, strict=True))
    truth = x.double() @ dense[0].double().T
    error = distance(kernels[0](x, None), truth) / distance(torch.nn.functional.linear(x, dense[0]), truth)
    print(
        f"| {count} | {name} [{n}, {k}] | {bf16_us:.1f} | {nested_us:.1f} | {nested_us / bf16_us:.2f} | {error:.2f} |",
        flush=True,
    )
    return {
        "rows": count, "layer": name, "bf16_us": bf16_us, "nested_us": nested_us, "error": error,
    }  # fmt: skip


def random_weight(n: int, k: int) -> Tensor:
    return (torch.randn(n, k, device="cuda") * 0.02).bfloat16()


def nest(weight: Tensor) -> NestedCUDA:
    laid_out = split(weight)
    if isinstance(laid_out, str):
        raise SystemExit(laid_out)
    return NestedCUDA(laid_out)


def distance(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm())


def capture(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median of a CUDA graph of `work`."""
    graph = capture(work)
    return statistics.median(replay(graph) for _ in range(rounds)) / 1e3


def replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) * 1e3


if __name__ == "__main__":
    main()
