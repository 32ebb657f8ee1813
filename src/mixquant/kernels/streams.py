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

MOST_FEW = 512
"""Rows that the side stream may have. More wait for tensor cores too, and their memory, which no other stream gets
again, would count: engines measure theirs by a run of few precise rows."""


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def on_side_stream(device: torch.device) -> bool:
    """Whether what runs now is the `few` of a `side_by_side`, beside its `many`."""
    return device.type == "cuda" and torch.cuda.current_stream(device) == side_stream(device)


def side_by_side(
    device: torch.device, rows: tuple[int, int], few: Callable[[], Tensor], many: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The results of two pieces of work of so many `rows`, which share no memory that either writes.

    Where `device` is no CUDA device, one after the other. So are products of so few rows that the host, which starts
    them, is slower than the device, unless a graph is recorded. Else `few` runs on the device's side stream, which
    starts behind all work that was given before, and for which the current stream waits in the end. A graph that is
    recorded meanwhile forks and joins likewise.
    What `few` allocates needs no `record_stream`: only a later `few` can get its memory again, and starts behind
    whatever the current stream did with it.
    """
    if device.type != "cuda" or rows[0] > MOST_FEW:
        return few(), many()
    if rows[1] < HIDES_LAUNCHES and not torch.cuda.is_current_stream_capturing():
        return few(), many()
    current, side = torch.cuda.current_stream(device), side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):  # first: many's blocks would leave no room for few's
        small = few()
    large = many()
    current.wait_stream(side)
    return small, large
