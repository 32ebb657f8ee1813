"""Kernels of nested weights: they multiply by the BF16 weight, which is stored as an FP8 plane and four bits more.

What. A `NestedKernel` is a `PlainKernel`: the checkpoint's own weight, given back bit for bit. Its plane is the weight
of the FP8 kernel beside it, in the same memory. `kernels.pair` makes both of one weight.
Here is the base, and the readable reference in the place of a kernel: it joins the whole weight at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.formats.nested import TILE, Escapes, NestedTensor
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.kernels.base import Accepted, PlainKernel, Rejected, Verdict
from mixquant.kernels.cpu import PackedOneDNN
from mixquant.kernels.dense import Dense

NEEDS_FP8 = (8, 9)
"""The first compute capability with FP8: Ada; Hopper is 9.0, Blackwell 10.0 and 12.0."""


class NestedKernel(PlainKernel):
    """A kernel of a nested weight. Its tensors are `NestedTensor`'s; the plane [N, K] stays row-major."""

    def __init__(self, nested: NestedTensor) -> None:
        """Lay out a nested weight, which `formats.nested.check_escapes` has passed."""
        self.plane = nested.plane
        self.nibbles = nested.nibbles
        self.scales = nested.scales
        self.starts = nested.escapes.starts
        self.columns = nested.escapes.columns
        self.differences = nested.escapes.differences

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        """What holds for every kernel: bfloat16, and where a GPU multiplies by the plane, one with FP8."""
        if dtype is not torch.bfloat16:
            return Rejected(f"only bfloat16 weights nest, not {dtype}")
        if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < NEEDS_FP8:
            needed = "Ada, Hopper and Blackwell have it, from compute capability 8.9 on"
            return Rejected(f"needs a GPU with FP8 ({needed}), not {found[0]}.{found[1]}")
        return Accepted()

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        return f"nested weights need N to be a multiple of {TILE} and K of 64" if n % TILE or k % 64 else None

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        """Plane, nibbles, and a row's scale and first escape; what the escapes take, only the weights can tell."""
        return n * k * 3 // 2 + n * 8 + 4

    @property
    def fp8(self) -> RowwiseTensor:
        """The plane as the FP8 weight that it is, sharing its memory."""
        return RowwiseTensor(self.plane, self.scales)

    def dense(self) -> Tensor:
        """The weight [N, K] as the checkpoint has it, joined anew at each call."""
        return NestedTensor(
            self.plane, self.nibbles, self.scales, Escapes(self.starts, self.columns, self.differences)
        ).join()


class EmulatedNested(NestedKernel):
    """The plain product of this device by the joined weight: the same numbers as without nesting, and no speed."""

    name = "emulation.nested"
    emulated = True

    def __init__(self, nested: NestedTensor) -> None:
        super().__init__(nested)
        packs = PackedOneDNN.check(nested.plane.device, torch.bfloat16) == Accepted()
        self.plain: type[PlainKernel] = PackedOneDNN if packs else Dense

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.plain(self.dense())(x, bias)
