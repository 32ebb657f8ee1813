"""CPU kernels by oneDNN: prepacked BF16, and INT8 W8A8.

Both keep the weight in oneDNN's own blocked layout, which `F.linear` would otherwise rebuild at every call (2x slower
at one row), so a converted model holds no second, plain copy. Activations of the INT8 kernel are u8 with zero point
128: with s8 ones, CPUs without AMX fall into a scalar loop, 400 times slower. Per-token scales and the bias are applied
after the product, in FP32. Each kernel is one `mixquant::` op, opaque to torch.compile, which cannot trace
prepacked weights.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mixquant.devices import cpu_isa, has_bf16
from mixquant.formats import int8
from mixquant.formats.rowwise import RowwiseTensor, row_scales
from mixquant.kernels.base import Accepted, PlainKernel, QuantizedKernel, Rejected, Verdict
from mixquant.kernels.fusion import fused


class PackedOneDNN(PlainKernel):
    """BF16 with the weight prepacked."""

    name = "onednn.bf16"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if device.type != "cpu":
            return Rejected(f"runs on CPU, not on {device.type}")
        if dtype is not torch.bfloat16:
            return Rejected(f"multiplies bfloat16, not {dtype}")
        if not has_bf16():
            return Rejected("this CPU has no BF16 instructions")
        return Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k * 2

    def __init__(self, weight: Tensor) -> None:
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, _bf16_linear(x, self.weight, bias))

    def dense(self) -> Tensor:
        """The weight [N, K] as the checkpoint has it, unpacked anew at each call."""
        return self.weight.to_dense()


class Int8OneDNN(QuantizedKernel[RowwiseTensor]):
    """INT8 W8A8 on VNNI or AMX."""

    name = "onednn.int8"
    format = "int8"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if device.type != "cpu":
            return Rejected(f"runs on CPU, not on {device.type}")
        if dtype is torch.float64:
            return Rejected("scales in float32, which would round float64 activations")
        if cpu_isa() == "none":
            return Rejected("this CPU has neither VNNI nor AMX")
        return Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k + n * 4

    @classmethod
    def pays(cls, n: int, k: int) -> bool:
        # On AMX the BF16 product is so fast that quantizing activations eats the gain of small layers.
        return n * k >= (4 << 20 if cpu_isa() == "amx" else 1 << 16)

    def __init__(self, quantized: RowwiseTensor, dtype: torch.dtype) -> None:
        self.weight: Tensor = torch.ops.onednn.qlinear_prepack(quantized.codes, None)
        self.weight_scales = quantized.scales.flatten()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, _int8_linear(x, self.weight, self.weight_scales, bias))


@torch.library.custom_op("mixquant::bf16_linear", mutates_args=())
def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


@_bf16_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("mixquant::int8_linear", mutates_args=())
def _int8_linear(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    codes, scales = _quantize_u8(x)
    zero_points = torch.zeros_like(weight_scales, dtype=torch.int64)
    product = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, int8.ZERO_POINT, weight, weight_scales, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return _scale_rows(product, scales, x.new_zeros(()) if bias is None else bias)


@_int8_linear.register_fake
def _(x: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight_scales.shape[0])


@fused
def _quantize_u8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`formats.int8.quantize` with codes shifted by the zero point: uint8 [rows, K], float32 [rows, 1]."""
    x = x.to(torch.float32)
    scales = row_scales(x, int8.CODE_MAX)
    codes = torch.round(x * (1.0 / scales)).clamp(-int8.CODE_MAX, int8.CODE_MAX)
    return (codes + int8.ZERO_POINT).to(torch.uint8), scales


@fused
def _scale_rows(product: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """Per-token scales and bias on a float32 product, rounded once to the bias' dtype, which is the model's."""
    return (product * scales + bias).to(bias.dtype)
