"""Kernels of a nested weight: the checkpoint's own weight in 12 bits, whose plane is the FP8 prefill weight too.

    layout = kernel.nest(weight)    the planes as a kernel wants them; `layout.fp8` is what a prefill kernel takes
    kernel(layout)                  the decode side, sharing the plane's memory

`layer` makes the kernels of both phases. On NVIDIA GPUs `nested_cuda` multiplies without joining the planes first.
Everywhere else `EmulatedNested` joins them at each call, to show what nested storage computes: it saves memory and
costs time.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, cast

import torch
from torch import Tensor

from mixquant.formats.nested import TILE, Escapes, NestedTensor, split, too_many_escapes
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.kernels.base import Accepted, PlainKernel, Rejected, Verdict
from mixquant.kernels.cpu import PackedOneDNN
from mixquant.kernels.cuda import reject_unless_fp8
from mixquant.kernels.dense import Dense

BLOCK = 64
"""What K must be a multiple of: the columns that a kernel rebuilds at once."""


class Layout(Protocol):
    """A nested weight as a kernel reads it."""

    @property
    def fp8(self) -> RowwiseTensor:
        """The plane as the FP8 weight that it is, sharing its memory."""


class NestedKernel(PlainKernel):
    """A kernel of a nested weight.

    plane: float8_e4m3fn [N, K]; plane_scales: float32 [N, 1].
    """

    plane: Tensor
    plane_scales: Tensor

    @abstractmethod
    def __init__(self, weight: Layout) -> None:
        """Multiply by what `nest` of this class has laid out."""

    @classmethod
    @abstractmethod
    def nest(cls, weight: Tensor) -> Layout | str:
        """A weight [N, K] laid out, or why it may not nest: `formats.nested.too_many_escapes`.

        Raises InputError for NaN and Inf.
        """

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        if n % TILE or k % BLOCK:
            return f"nested weights need N to be a multiple of {TILE} and K of {BLOCK}"
        return None

    @classmethod
    def prepare(cls, device: torch.device) -> None:
        """Begin what takes a while, such as compiling, before there are weights."""

    @classmethod
    def default_on(cls, device: torch.device) -> bool:
        """Whether `storage=auto` nests there: this kernel has been measured to be worth it."""
        return False

    @property
    def fp8(self) -> RowwiseTensor:
        """The plane as the FP8 weight that it is, sharing its memory."""
        return RowwiseTensor(self.plane, self.plane_scales)


class EmulatedNested(NestedKernel):
    """Joins the planes, then multiplies as this device does without nesting: the same numbers, bit for bit."""

    name = "emulation.nested"
    emulated = True

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if dtype is not torch.bfloat16:
            return Rejected(f"only bfloat16 weights nest, not {dtype}")
        return (reject_unless_fp8(device) if device.type == "cuda" else None) or Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        """Plane, nibbles, and a row's scale and first escape; what the escapes take, only the weights can tell."""
        return n * k * 3 // 2 + n * 8 + 4

    @classmethod
    def nest(cls, weight: Tensor) -> NestedTensor | str:
        nested = split(weight)
        return too_many_escapes(nested.escapes.by_tile(), weight.shape[1]) or nested

    def __init__(self, weight: NestedTensor) -> None:
        self.plane = weight.plane
        self.plane_scales = weight.scales
        self.nibbles = weight.nibbles
        self.starts = weight.escapes.starts
        self.columns = weight.escapes.columns
        self.differences = weight.escapes.differences

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            weight = self.plane, self.nibbles, self.plane_scales, self.starts, self.columns, self.differences
            return cast(Tensor, _opaque_linear(x, bias, *weight))
        packs = PackedOneDNN.check(self.plane.device, torch.bfloat16) == Accepted()
        plain: type[PlainKernel] = PackedOneDNN if packs else Dense
        return plain(self.dense())(x, bias)

    def dense(self) -> Tensor:
        """The weight [N, K] as the checkpoint has it, joined anew at each call."""
        escapes = Escapes(self.starts, self.columns, self.differences)
        return NestedTensor(self.plane, self.nibbles, self.plane_scales, escapes).join()


@torch.library.custom_op("mixquant::emulated_nested_linear", mutates_args=())
def _opaque_linear(
    x: Tensor,
    bias: Tensor | None,
    plane: Tensor,
    nibbles: Tensor,
    scales: Tensor,
    starts: Tensor,
    columns: Tensor,
    differences: Tensor,
) -> Tensor:
    """The same for torch.compile, which shall not look inside."""
    return EmulatedNested(NestedTensor(plane, nibbles, scales, Escapes(starts, columns, differences)))(x, bias)


@_opaque_linear.register_fake
def _(x: Tensor, bias: Tensor | None, plane: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], plane.shape[0])
