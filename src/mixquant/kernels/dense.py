"""The checkpoint's own weight: BF16, or whatever dtype the model has.

`torch.linear` is plain F.linear. On CPUs without BF16 instructions its BF16 products are a scalar loop, seven times
slower than FP32's, so there `torch.linear.fp32` widens the operands first: products of BF16 are exact in FP32 and were
summed in FP32 all along, so nothing changes but the order of the sum. The widened weight lives for one call only, which
pays from a few rows on; below, as in every matrix library, another routine does the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mixquant.devices import has_bf16
from mixquant.kernels.base import Accepted, PlainKernel, Rejected, Verdict

WIDENED_ROWS = 16
"""From so many rows on, widening a weight costs less than it saves."""

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [rows, K], weight [N, K], bias [N] or None -> [rows, N], all of one dtype."""


class Dense(PlainKernel):
    """Plain F.linear on any device and dtype."""

    name = "torch.linear"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        return Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k * dtype.itemsize

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, self.weight, bias)

    def dense(self) -> Tensor:
        return self.weight


class WidenedDense(Dense):
    """F.linear in FP32 on BF16 operands, for CPUs without BF16 instructions."""

    name = "torch.linear.fp32"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if device.type != "cpu":
            return Rejected(f"runs on CPU, not on {device.type}")
        if dtype is not torch.bfloat16:
            return Rejected(f"widens bfloat16, not {dtype}")
        return Rejected("this CPU has BF16 instructions") if has_bf16() else Accepted()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, widened_linear(x, self.weight, bias))


def fastest_linear(device: torch.device, dtype: torch.dtype) -> Linear:
    """F.linear, or what does the same faster here."""
    return widened_linear if isinstance(WidenedDense.check(device, dtype), Accepted) else nn.functional.linear


@torch.library.custom_op("mixquant::widened_linear", mutates_args=())
def widened_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear of BF16 operands by an FP32 product, rounded once."""
    if x.shape[:-1].numel() < WIDENED_ROWS:
        return nn.functional.linear(x, weight, bias)
    wide = None if bias is None else bias.to(torch.float32)
    return nn.functional.linear(x.to(torch.float32), weight.to(torch.float32), wide).to(x.dtype)


@widened_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class FastestLinears(TorchFunctionMode):
    """Inside, every F.linear of a model that was not converted is the fastest one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is nn.functional.linear and not kwargs:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            func, args = fastest_linear(x.device, x.dtype), (x, weight, bias)
        return func(*args, **(kwargs or {}))
