"""Kernels of a nested weight: the checkpoint's own weight in 12 bits, whose plane is the FP8 prefill weight too.

    NestedKernel(split(weight))    the decode side; `fp8` is what a prefill kernel takes, sharing the plane's memory

On NVIDIA GPUs `nested_cuda` multiplies without joining the planes first. Everywhere else `EmulatedNested` joins them at
each call, to show what nested storage computes: it saves memory and costs time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixquant.formats.nested import TILE, NestedTensor
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.kernels.base import Accepted, PlainKernel, Verdict

BLOCK = 64
"""What K must be a multiple of: the columns that a kernel rebuilds at once."""


class NestedKernel(PlainKernel):
    """A kernel of a nested weight.

    plane: float8_e4m3fn [N, K]; plane_scales: float32 [N, 1].
    """

    plane: Tensor
    plane_scales: Tensor

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k * 3 // 2 + n * 4

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        if n % TILE or k % BLOCK:
            return f"nested weights need N to be a multiple of {TILE} and K of {BLOCK}"
        return None

    @property
    def fp8(self) -> RowwiseTensor:
        """The plane as the FP8 weight that it is, sharing its memory."""
        return RowwiseTensor(self.plane, self.plane_scales)


class EmulatedNested(NestedKernel):
    """Joins the planes, then multiplies."""

    name = "emulated.nested"
    emulated = True

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        return Accepted()

    def __init__(self, weight: NestedTensor) -> None:
        self.plane = weight.plane
        self.plane_scales = weight.scales
        self.nibbles = weight.nibbles
        self.escapes = weight.escapes

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.dense(), bias)

    def dense(self) -> Tensor:
        return NestedTensor(self.plane, self.nibbles, self.plane_scales, self.escapes).join()
