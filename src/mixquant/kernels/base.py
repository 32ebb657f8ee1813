"""What a kernel is: a weight in the layout one device likes, and a matrix product with it.

Kernels of quantized formats are laid out from a quantized weight: one that `quantize` has just made of the model's own,
or one that another tool wrote into a checkpoint (see `mixquant.folders`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor

from mixquant.formats import fp8, int8, nvfp4
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.formats.scales import RULES

Quantized = NVFP4Tensor | RowwiseTensor
"""A weight [N, K] in a quantized format."""

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
    def unfit(cls, n: int, k: int) -> str | None:
        """Why a weight [n, k] cannot be laid out, or None if it can."""
        return None

    @classmethod
    @abstractmethod
    def from_weight(cls, weight: Tensor, scales: str = "search", amax: Tensor | None = None) -> LinearKernel:
        """Quantize and lay out `weight` [N, K].

        scales: the NVFP4 scale rule. amax: largest magnitude (float32 []) of the whole weight that `weight` is a
        tensor-parallel shard of: it sets NVFP4's global scale.
        """

    @abstractmethod
    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [rows, K] in the model's dtype -> [rows, N] in the same dtype."""

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the layout holds."""
        return (value for value in vars(self).values() if isinstance(value, Tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearKernel:
        return self


class QuantizedKernel(LinearKernel, Generic[Q]):
    """A kernel of a quantized format."""

    @abstractmethod
    def __init__(self, quantized: Q, dtype: torch.dtype, activation_global_scale: float = ...) -> None:
        """Lay out a quantized weight for activations of `dtype`.

        activation_global_scale: the static multiplier of NVFP4 activations; other formats scale each token, and take
        none.
        """

    @classmethod
    def from_weight(cls, weight: Tensor, scales: str = "search", amax: Tensor | None = None) -> Self:
        return cls(cast(Q, quantize(cls.format, weight.detach(), scales, amax)), weight.dtype)

    @classmethod
    def from_quantized(cls, quantized: Q, dtype: torch.dtype, activation_global_scale: float | None = None) -> Self:
        """Lay out a checkpoint's quantized weight; without an activation scale, the format's own."""
        if activation_global_scale is None:
            return cls(quantized, dtype)
        return cls(quantized, dtype, activation_global_scale)


def quantize(format: str, weight: Tensor, scales: str = "search", amax: Tensor | None = None) -> Quantized:
    """A weight [N, K] in a quantized format; `scales` and `amax` as in `LinearKernel.from_weight`."""
    if format == "nvfp4":
        return nvfp4.quantize_weight(weight, RULES[scales], amax)
    return fp8.quantize(weight) if format == "fp8" else int8.quantize(weight)
