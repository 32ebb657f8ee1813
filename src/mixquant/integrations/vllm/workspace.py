"""Memory for experts that run beside others.

vLLM's fused experts keep what lies between their products in one buffer, which all layers share, since they run one
after the other. A mixed step runs the BF16 experts of its few rows beside the quantized ones of all rows: the few take
memory of their own, from torch's allocator. There it belongs to the stream that they run on, or to the graph that is
recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.worker import workspace

from mixquant.kernels.streams import on_side_stream


@dataclass(frozen=True)
class Allocator:
    """What stands in for vLLM's WorkspaceManager (`vllm.v1.worker.workspace`) in one product."""

    device: torch.device

    def get_simultaneous(self, *wanted: tuple[tuple[int, ...], torch.dtype]) -> list[Tensor]:
        """Uninitialized tensors of these shapes and dtypes, which share no memory."""
        return [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in wanted]


@contextlib.contextmanager
def own_workspace(device: torch.device) -> Iterator[None]:
    """Inside, vLLM's experts take memory of their own, if they run on the side stream; else all is as it was."""
    if not on_side_stream(device):
        yield
        return
    shared = workspace._manager
    workspace._manager = Allocator(device)
    try:
        yield
    finally:
        workspace._manager = shared
