"""The truth that kernels are compared to, and how far from it they may be.

Tolerances are derived, not tuned. A kernel rounds its result to the model's dtype once, or as often as its docstring
says, each time by at most one unit of the value; scales and bias are up to four float32 units more; and sums of K exact
products in float32 are off by at most K units of the sum of magnitudes (twice the originals', to cover quantized ones).
Float64 emulation is exact: its codes have so few bits that no sum rounds. A control is wrong by one code or one scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.formats import FORMATS, quantizer
from mixquant.formats.nvfp4 import ACTIVATION_GLOBAL_SCALE
from mixquant.kernels import KERNELS, Accepted, LinearKernel
from mixquant.kernels.base import PlainKernel, QuantizedKernel
from mixquant.kernels.emulation import EmulatedFP8, EmulatedInt8
from tests.formats.inputs import INPUTS, gaussian

CPU = torch.device("cpu")
ROWS, N, K = 9, 40, 96
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

EVERYTHING = torch.cat([make().float() for make in INPUTS.values()])

ALL = [kernel for kernels in KERNELS.values() for kernel in kernels]


def accepted(dtype: torch.dtype) -> list[type[LinearKernel]]:
    """The kernels that run here for a model of `dtype`."""
    return [kernel for kernel in ALL if isinstance(kernel.check(CPU, dtype), Accepted)]


def activations(dtype: torch.dtype) -> Tensor:
    return gaussian(ROWS, K).to(dtype)


def weights(dtype: torch.dtype) -> Tensor:
    return gaussian(N, K, seed=1).to(dtype)


def eighths(dtype: torch.dtype) -> Tensor:
    """A bias that is exact in every dtype and whose sums with codes are exact in float64."""
    return (torch.arange(N, dtype=dtype) - N // 2) / 8


def build(kernel: type[LinearKernel], weight: Tensor) -> LinearKernel:
    """A kernel for a model's weight, quantized as policies do by default."""
    if issubclass(kernel, QuantizedKernel):
        return kernel.from_weight(weight, quantizer(kernel.format))
    assert issubclass(kernel, PlainKernel)
    return kernel(weight)


def reference(format: str, x: Tensor, weight: Tensor) -> Tensor:
    """The truth in float64 [rows, N]."""
    if format == "bf16":
        return x.double() @ weight.double().T
    return FORMATS[format].quantize_input(x, ACTIVATION_GLOBAL_SCALE).matmul(quantizer(format)(weight))


def excess(y: Tensor, truth: Tensor, bias: Tensor | None = None, roundings: int = 1) -> float:
    """The largest error of y in tolerances: at most 1 if the kernel is right."""
    bias = torch.zeros(N) if bias is None else bias
    values = truth.abs() + bias.double().abs()
    magnitudes = 2 * activations(torch.float64)[: len(y)].abs() @ weights(torch.float64).abs().T
    single = UNIT[torch.float32]
    tolerance = roundings * UNIT[y.dtype] * values + 4 * single * values + K * single * magnitudes
    return float(((y.double() - truth - bias.double()).abs() / tolerance).max())


def roundings(kernel: type[LinearKernel]) -> int:
    """How often a kernel rounds to the model's dtype: emulated FP8 and INT8 do it before the scales too."""
    return 2 if kernel in (EmulatedFP8, EmulatedInt8) else 1


def wrong_sign(weight: Tensor) -> Tensor:
    """One code of the weight is another, no scale is."""
    weight = weight.clone()
    weight[3, weight[3].abs().argmax()] *= -1
    return weight


def wrong_scale(weight: Tensor) -> Tensor:
    """One output channel is an eighth larger: one step of an E4M3 scale, or so."""
    weight = weight.clone()
    weight[3] *= 1.125
    return weight


def float32_excess(kernel: type[QuantizedKernel], m: int, n: int, k: int, with_bias: bool) -> list[float]:
    """The errors of an NVFP4 kernel for float32 x [m, k] and a weight [n, k], and of one for another weight, in units
    of what float32 sums may be off by."""
    x, weight = gaussian(m, k), gaussian(n, k, seed=1)
    bias = gaussian(1, n, seed=2)[0] if with_bias else None
    y = build(kernel, weight)(x, bias).double()
    tolerance = (6 + k) * UNIT[torch.float32] * (2 * x.double().abs() @ weight.double().abs().T + 1)
    truths = [reference("nvfp4", x, other) for other in (weight, wrong_sign(weight))]
    return [float(((y - truth - (0.0 if bias is None else bias)).abs() / tolerance).max()) for truth in truths]
