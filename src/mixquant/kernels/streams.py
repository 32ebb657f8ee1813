"""Two products at once, on two CUDA streams.

The precise product of a mixed step has few rows: it waits for its weight to arrive, while the quantized product of all
rows waits for tensor cores. Side by side, most of the first hides behind the second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

HIDES_LAUNCHES = 4096
"""Rows of a quantized product that takes longer than the host takes to start two more kernels on another stream."""


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def side_by_side(x: object, few: Callable[[], Tensor], many: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The results of two pieces of work on the rows x, which do not depend on each other.

    Where x is no tensor on CUDA, one after the other: experts of vLLM share their workspaces. So are products of so few
    rows that the host, which starts them, is slower than the device, unless a graph is recorded. Else `few` runs on the
    device's side stream, which starts behind all work that was given before, and for which the current stream waits in
    the end. A graph that is recorded meanwhile forks and joins likewise.
    What `few` allocates needs no `record_stream`: only a later `few` can get its memory again, and starts behind
    whatever the current stream did with it.
    """
    if not isinstance(x, Tensor) or not x.is_cuda:
        return few(), many()
    if len(x) < HIDES_LAUNCHES and not torch.cuda.is_current_stream_capturing():
        return few(), many()
    current, side = torch.cuda.current_stream(x.device), side_stream(x.device)
    side.wait_stream(current)
    with torch.cuda.stream(side):  # first: many's blocks would leave no room for few's
        small = few()
    large = many()
    current.wait_stream(side)
    return small, large
