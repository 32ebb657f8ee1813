"""What a kernel is: a weight in the layout one device likes, and a matrix product with it.

    PlainKernel(weight)                               the checkpoint's own weight
    QuantizedKernel.from_weight(weight, quantize)     quantized now, by a quantizer that the policy chose
    QuantizedKernel.from_quantized(quantized, dtype)  quantized before, by another tool (`checkpoint.quantized`)

A class answers for a device before it holds a weight: `check`, `unsupported`, `pays` and `nbytes` need shapes only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from mixquant.formats import Quantizer
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.formats.rowwise import RowwiseTensor

Q = TypeVar("Q", NVFP4Tensor, RowwiseTensor)


@dataclass(frozen=True)
class Accepted:
    """The kernel runs here."""


@dataclass(frozen=True)
class Rejected:
    """The kernel does not run here, and why."""

    reason: str


Verdict = Accepted | Rejected


class LinearKernel(ABC):
    """y = x @ weight.T + bias for x [rows, K], row by row independent.

    A plain object and no nn.Module: its tensors are a layout of a weight, which nothing may initialise, move, cast or
    save. Instances are immutable after construction, so copies of a model share them.
    """

    name: ClassVar[str]
    format: ClassVar[str]
    emulated: ClassVar[bool] = False
    keeps_weight: ClassVar[bool] = False
    """Whether it multiplies by the very tensor that it was given, so that this one cannot go."""

    @classmethod
    @abstractmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        """Whether this kernel runs on `device` with activations of `dtype`."""

    @classmethod
    @abstractmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        """Bytes that a weight [n, k] takes in this kernel's layout."""

    @classmethod
    def pays(cls, n: int, k: int) -> bool:
        """Whether `auto` should use this kernel for a weight [n, k]: not where quantizing costs more than it saves."""
        return True

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        """Why a weight [n, k] cannot be laid out, or None if it can."""
        return None

    @abstractmethod
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [rows, K] in the model's dtype -> [rows, N] in the same dtype."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the layout holds."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearKernel:
        return self


class PlainKernel(LinearKernel):
    """A kernel of the checkpoint's own weight, which it can give back."""

    format = "bf16"

    @abstractmethod
    def __init__(self, weight: Tensor) -> None:
        """Lay out `weight` [N, K]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight [N, K] as the checkpoint has it."""


class QuantizedKernel(LinearKernel, Generic[Q]):
    """A kernel of a quantized format."""

    @abstractmethod
    def __init__(self, quantized: Q, dtype: torch.dtype, activation_global_scale: float = ...) -> None:
        """Lay out a quantized weight for activations of `dtype`.

        activation_global_scale: the static multiplier of NVFP4 activations; other formats scale each token, and take
        none.
        """

    @classmethod
    def from_weight(cls, weight: Tensor, quantize: Quantizer) -> Self:
        """Quantize `weight` [N, K], by a quantizer of this kernel's format, and lay it out."""
        return cls(cast(Q, quantize(weight.detach())), weight.dtype)

    @classmethod
    def from_quantized(cls, quantized: Q, dtype: torch.dtype, activation_global_scale: float | None = None) -> Self:
        """Lay out a checkpoint's quantized weight; without an activation scale, the format's own."""
        if activation_global_scale is None:
            return cls(quantized, dtype)
        return cls(quantized, dtype, activation_global_scale)
