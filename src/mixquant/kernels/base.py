"""What a kernel is: a weight in the layout one device likes, and a matrix product with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


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
