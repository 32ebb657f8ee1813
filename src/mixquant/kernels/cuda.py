"""CUDA kernels by torch's scaled matrix products: FP8 row-wise (Ada, Hopper, Blackwell) and NVFP4 (Blackwell).

The NVFP4 kernel is W4A4 on tensor cores; where the device has none it answers Rejected, there is no weight-only
fallback. Its layout is what cuBLASLt reads: packed codes, 128x4-swizzled scales, one FP32 factor 1/(g_x * g_w) for the
output. Neither kernel has run on Blackwell yet: only its shapes and dtypes are checked, on torch's meta device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixquant.formats import fp8, nvfp4
from mixquant.formats.rowwise import RowwiseTensor, row_scales
from mixquant.kernels.base import Accepted, QuantizedKernel, Rejected, Verdict
from mixquant.kernels.fusion import fused


def _reject_unless_bf16_cuda(device: torch.device, dtype: torch.dtype) -> Rejected | None:
    if device.type != "cuda":
        return Rejected(f"runs on CUDA, not on {device.type}")
    if dtype is not torch.bfloat16:
        return Rejected(f"multiplies bfloat16 activations, not {dtype}")
    return None


class FP8ScaledMM(QuantizedKernel[RowwiseTensor]):
    """FP8 W8A8, per output channel and per token, by torch._scaled_mm."""

    name = "torch.scaled_mm.fp8"
    format = "fp8"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if rejected := _reject_unless_bf16_cuda(device, dtype):
            return rejected
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            return Rejected(f"needs compute capability 8.9 (Ada) or newer, not {capability[0]}.{capability[1]}")
        return Accepted()

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        return "FP8 tensor cores need N and K to be multiples of 16" if n % 16 or k % 16 else None

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k + n * 4

    def __init__(self, quantized: RowwiseTensor, dtype: torch.dtype) -> None:
        self.weight = quantized.codes
        self.weight_scales = quantized.scales.t().contiguous()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        codes, scales = _quantize_fp8(x)
        return torch._scaled_mm(
            codes, self.weight.t(), scale_a=scales, scale_b=self.weight_scales, bias=bias, out_dtype=x.dtype
        )


class NVFP4ScaledMM(QuantizedKernel[nvfp4.NVFP4Tensor]):
    """NVFP4 W4A4 by torch.nn.functional.scaled_mm."""

    name = "torch.scaled_mm.nvfp4"
    format = "nvfp4"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if rejected := _reject_unless_bf16_cuda(device, dtype):
            return rejected
        capability = torch.cuda.get_device_capability(device)
        if capability < (10, 0):
            return Rejected(f"needs FP4 tensor cores (Blackwell, 10.0), not {capability[0]}.{capability[1]}")
        return Accepted()

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        return "torch.scaled_mm needs N and K to be multiples of 16" if n % 16 or k % nvfp4.BLOCK else None

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k // 2 + -(-n // 128) * 128 * -(-k // 64) * 4 + 4

    def __init__(
        self,
        quantized: nvfp4.NVFP4Tensor,
        dtype: torch.dtype,
        activation_global_scale: float = nvfp4.ACTIVATION_GLOBAL_SCALE,
    ) -> None:
        self.activation_global_scale = activation_global_scale
        self.weight = quantized.packed
        self.weight_scales = nvfp4.swizzle(quantized.scales)
        self.weight_decode = (1.0 / quantized.global_scale).reshape(1)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        global_scale = torch.full((), self.activation_global_scale, device=x.device)
        values = x.to(torch.float32)
        quantized = nvfp4.encode(values, global_scale, nvfp4.block_scales(values, global_scale))
        block, tensor = nn.functional.ScalingType.BlockWise1x16, nn.functional.ScalingType.TensorWise
        swizzled, plain = nn.functional.SwizzleType.SWIZZLE_32_4_4, nn.functional.SwizzleType.NO_SWIZZLE
        return nn.functional.scaled_mm(
            quantized.packed.view(torch.float4_e2m1fn_x2),
            self.weight.view(torch.float4_e2m1fn_x2).t(),
            scale_a=[nvfp4.swizzle(quantized.scales), (1.0 / quantized.global_scale).reshape(1)],
            scale_recipe_a=[block, tensor],
            swizzle_a=[swizzled, plain],
            scale_b=[self.weight_scales, self.weight_decode],
            scale_recipe_b=[block, tensor],
            swizzle_b=[swizzled, plain],
            bias=bias,
            output_dtype=x.dtype,
        )


@fused
def _quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`formats.fp8.quantize`, fused: float8_e4m3fn [rows, K], float32 [rows, 1]."""
    x = x.to(torch.float32)
    scales = row_scales(x, fp8.CODE_MAX)
    codes = (x * (1.0 / scales)).clamp(-fp8.CODE_MAX, fp8.CODE_MAX)
    return codes.to(torch.float8_e4m3fn), scales
