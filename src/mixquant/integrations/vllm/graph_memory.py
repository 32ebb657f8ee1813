"""What CUDA graphs will take, where vLLM's V1 runner measures it before it sizes the KV cache.

vLLM captures the first two graphs of each mode, and takes the second one's memory for that of all others. But graphs
share a pool: a second graph that takes more than the first has made the pool grow, which comes once. Experts in two
precisions do that: of Qwen3-30B-A3B the two samples of full graphs were 2 and 390 MiB on an H200, which made 21.1 GiB
of 53 graphs that took 1.8 with all others. Here the lesser of two samples stands for the graphs that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

LEAST = 1 << 20
"""Bytes of the driver for each graph: vLLM's own number."""


@dataclass
class GraphMemory:
    """What is measured while an engine's graphs are estimated. counts: graphs that will be captured, by mode. samples:
    bytes that those took which have been."""

    counts: dict[Any, int] = field(default_factory=dict)
    samples: dict[Any, list[int]] = field(default_factory=dict)

    def correct(self, total: int) -> int:
        """vLLM's estimate in bytes, with ours in the place of its part for these modes: it may hold encoders too."""
        return self.estimate() + max(total - self.vllms(), 0)

    def estimate(self) -> int:
        return sum(_mode(self.counts[mode], found) for mode, found in self.samples.items())

    def vllms(self) -> int:
        """vLLM's own: the greatest first sample, and in each mode the second for each of the others."""
        first = max((found[0] for found in self.samples.values()), default=0)
        return first + sum(
            (self.counts[mode] - 1) * max(found[1] if len(found) > 1 else 0, LEAST)
            for mode, found in self.samples.items()
        )


def _mode(count: int, samples: Sequence[int]) -> int:
    return sum(samples) + (count - len(samples)) * max(min(samples), LEAST)


def free() -> int:
    """Bytes that the device has left."""
    torch.accelerator.synchronize()
    available: int = torch.accelerator.get_memory_info()[0]
    return available
