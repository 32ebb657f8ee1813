"""A BF16 weight laid out on an NVIDIA GPU as the nested kernels read it: `formats.nested.split`, by a kernel.

Why. There a chain of small torch operations takes 54 bytes for each weight that it works on, and seconds for a model.
Here two reductions read a weight, for its rows' offsets, and the kernel (nested_split.cu) reads it once more; no memory
is taken but what stays. `tests/kernels/nested_layout.py` says in torch's words what lies where, and tests compare bits.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats import nested
from mixquant.formats.nested import TILE
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.kernels import nvrtc
from mixquant.kernels.nested import BLOCK

SOURCES = ("nested_block.cu", "nested_split.cu")
KERNELS = ("split", "split_others")
"""A module of their own: where the plane alone stays, no product needs to be compiled."""

ROOM = 2048
"""Weights for each place in `more`: new weights in a running engine have other escapes, and CUDA graphs remember where
the old ones are. The 2.3e-3 escapes of outlier columns need two thirds of it, if they fall at random. It takes 0.016
bits a weight."""

MOST_OTHERS = 1 << 21
"""Escapes behind the first three of their blocks that a weight may have: where a block's begin takes 21 bits. A weight
of fewer than 400M values has fewer, unless more of them escape than may."""


@dataclass(frozen=True)
class Blocks:
    """A weight [N, K] by blocks of 16 x 64, as nested_block.cu describes it.

    plane: float8_e4m3fn [N, K]. scales: float32 [N, 1]. nibbles: uint8 [K/64, N/16, 32, 16].
    escapes: int32 [K/64 * N/16, 4], how many a block has, from bit 11 on where its others begin, and the first three.
    more: int32, all others, and room.
    """

    plane: Tensor
    scales: Tensor
    nibbles: Tensor
    escapes: Tensor
    more: Tensor

    @property
    def fp8(self) -> RowwiseTensor:
        """The plane as the FP8 weight that it is, sharing its memory."""
        return RowwiseTensor(self.plane, self.scales)


def prepare(device: torch.device) -> None:
    """Begin to compile."""
    nvrtc.begin(SOURCES, KERNELS, nvrtc.architecture(device))


def split(weight: Tensor) -> Blocks | str:
    """A weight in BF16, N a multiple of 16 and K of 64, laid out, or why it may not nest: too many escapes.

    Raises InputError for NaN and Inf, and for escapes that no kernel could find or hold.
    """
    offsets = nested.offsets(weight)
    weight = weight.contiguous()
    weight = weight.clone() if weight.data_ptr() % 16 else weight  # the kernel reads 16 bytes at once
    n, k = weight.shape
    blocks = k // BLOCK * (n // TILE)
    plane = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    nibbles = torch.empty(k // BLOCK, n // TILE, 32, 16, dtype=torch.uint8, device=weight.device)
    escapes = torch.zeros(blocks, 4, dtype=torch.int32, device=weight.device)
    inexact = torch.zeros(1, dtype=torch.int32, device=weight.device)
    _launch("split", weight, offsets, plane, nibbles, escapes, inexact)
    counts = escapes[:, 0]
    if reason := nested.too_many_escapes(counts.view(-1, n // TILE).sum(0), k):
        return reason
    if inexact.item():
        raise InputError("A weight is 2^133 times smaller than the largest of its row: use an intact checkpoint.")
    others = (counts - 3).clamp(min=0)
    if (total := int(others.sum())) > MOST_OTHERS:
        raise InputError(f"A weight has {total} escapes behind the first three of its blocks: use storage=separate.")
    more = torch.zeros(max(total, n * k // ROOM), dtype=torch.int32, device=weight.device)
    if total:
        counts |= (others.cumsum(0) - others << 11).to(torch.int32)
        _launch("split_others", weight, offsets, escapes, more)
    return Blocks(plane, nested.scales_of(offsets), nibbles, escapes, more)


class _Source(ctypes.Structure):
    """`struct Source` of nested_split.cu."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
    )


def _launch(kernel: str, weight: Tensor, offsets: Tensor, *others: Tensor) -> None:
    """A kernel on all blocks of a weight."""
    n, k = weight.shape
    module = nvrtc.load(SOURCES, KERNELS, nvrtc.architecture(weight.device), weight.device)
    source = _Source(weight.data_ptr(), offsets.data_ptr(), n, k)
    grid = (n // TILE, -(-k // (BLOCK * 32)), 1)  # four blocks for each of eight warps
    module.launch(kernel, grid, 256, 0, source, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in others))
