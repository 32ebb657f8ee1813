"""The checkpoint's own weight: BF16, or whatever dtype the model has.

What. Plain F.linear, on any device.
How it differs on old CPUs. Without BF16 instructions a BF16 product is a scalar loop: at 256 rows of a 512 x 512 weight
25.5 ms on one core of an AVX2 machine, where FP32 takes 3.4 ms with the conversion of both operands. So there the
operands are widened first. Products of BF16 are exact in FP32 and were summed in FP32 all along: nothing changes but
the order of the sum.
Trade-off. The widened weight lives for one call only, so memory does not double. That pays from a few rows on; below,
as in every matrix library, another routine does the same sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixquant.devices import has_bf16
from mixquant.kernels.base import Accepted, PlainKernel, Verdict

WIDENED_ROWS = 16
"""From so many rows on, widening a weight costs less than it saves."""

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [..., K], weight [N, K], bias [N] or None -> [..., N], all of one dtype."""


class Dense(PlainKernel):
    """F.linear, or what does the same faster here."""

    name = "torch.linear"
    keeps_weight = True

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        return Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k * dtype.itemsize

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self.linear = fastest_linear(weight.device, weight.dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.linear(x, self.weight, bias)

    def dense(self) -> Tensor:
        return self.weight


def fastest_linear(device: torch.device, dtype: torch.dtype) -> Linear:
    """F.linear, or what does the same faster here."""
    widens = device.type == "cpu" and dtype is torch.bfloat16 and not has_bf16()
    return widened_linear if widens else nn.functional.linear


def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of BF16 operands by an FP32 product, rounded once."""
    if x.shape[:-1].numel() < WIDENED_ROWS:
        return nn.functional.linear(x, weight, bias)
    wide = None if bias is None else bias.to(torch.float32)
    return nn.functional.linear(x.to(torch.float32), weight.to(torch.float32), wide).to(x.dtype)


def use_fastest_linear_(model: nn.Module, device: torch.device) -> None:
    """Let every nn.Linear of a model that is not converted, and will run on `device`, multiply as `Dense` does."""
    for module in model.modules():
        if type(module) is nn.Linear:
            linear = fastest_linear(device, module.weight.dtype)
            module.forward = functools.partial(_forward, module, linear)  # type: ignore[method-assign]


def _forward(module: nn.Linear, linear: Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)  # looked up now: the weights may come and go, layer by layer
