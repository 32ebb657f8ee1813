"""The checkpoint's own weight, multiplied by torch.nn.functional.linear: BF16, or whatever dtype the model has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixquant.kernels.base import Accepted, LinearKernel, Verdict


class Dense(LinearKernel):
    """Plain F.linear on any device and dtype."""

    name = "torch.linear"
    format = "bf16"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        return Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k * dtype.itemsize

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @classmethod
    def from_weight(cls, weight: Tensor, scales: str = "search", amax: Tensor | None = None) -> Dense:
        return cls(weight.detach())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, bias)

    def dense(self) -> Tensor:
        """The weight [N, K] as the checkpoint has it."""
        return self.weight
