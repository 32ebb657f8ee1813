"""What nesting the linear layers of a model takes while it loads: seconds, and memory at its highest, part by part.

    python benchmarks/nested_loading.py [LAYERS]      # one GPU with FP8: 20 s

"offsets" is a part of "split" that is timed again by itself. Kernels are compiled before, and timed too.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.nested_linear import SHAPES, nest
from mixquant.formats import nested
from mixquant.kernels import nested_cuda, nested_split

GIB = 2**30


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    shapes = list(SHAPES.values()) * layers
    weights: list[Tensor | None] = [
        torch.empty(shape, dtype=torch.bfloat16, device="cuda").uniform_(-1e-3, 1e-3) for shape in shapes
    ]
    spent: dict[str, float] = defaultdict(float)
    peak: dict[str, float] = defaultdict(float)

    def timed(part: str, work: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        spent[part] += time.perf_counter() - began
        peak[part] = max(peak[part], torch.cuda.max_memory_allocated() - before)
        return result

    def line(what: str) -> None:
        free, total = torch.cuda.mem_get_info()
        allocated, reserved = torch.cuda.memory_allocated() / GIB, torch.cuda.memory_reserved() / GIB
        print(f"{what}: allocated {allocated:.2f} GiB, reserved {reserved:.2f}, of the GPU {(total - free) / GIB:.2f}")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {layers} layers of Qwen3-8B's")
    small = torch.ones(16, 64, dtype=torch.bfloat16, device="cuda")
    timed("compile what lays out", lambda: nested_split.split(small))
    timed("compile what multiplies", lambda: nest(small).module)
    line("BF16")
    kernels = []
    for i in range(len(weights)):
        weight = weights[i]
        assert weight is not None
        timed("offsets", lambda w=weight: nested.offsets(w))
        laid_out = timed("split", lambda w=weight: nested_split.split(w))
        kernels.append(timed("kernel", lambda blocks=laid_out: nested_cuda.NestedCUDA(blocks)))
        weights[i] = weight = laid_out = None
        if i % 8 == 7:
            line(f"after {i + 1} weights")
    for part, seconds in spent.items():
        print(f"{part}: {seconds:.3f} s, at most {peak[part] / GIB:.3f} GiB more")


if __name__ == "__main__":
    main()
