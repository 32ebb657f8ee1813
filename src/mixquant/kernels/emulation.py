"""Emulation: the numbers of a quantized kernel on any device, for quality and never for speed.

Weights are kept as exact BF16 codes (NVFP4: code * block scale; FP8 and INT8: codes), activations are quantized and
dequantized in one fused pass, and an ordinary matrix product in the model's dtype does the rest. Every operand is
exact in BF16, so results equal the native kernel's up to summation order and the last rounding. The BF16 copy takes
2 bytes a weight, which the memory bill counts.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from mixquant.formats import fp8, int8, nvfp4
from mixquant.formats.checks import row_slices
from mixquant.formats.rowwise import RowwiseTensor, row_scales
from mixquant.kernels.base import Accepted, Q, QuantizedKernel, Rejected, Verdict
from mixquant.kernels.dense import fastest_linear
from mixquant.kernels.fusion import fused, fusion_backend


class _Emulation(QuantizedKernel[Q]):
    """Shared by all formats: runs anywhere, holds a weight of exact codes in the model's dtype."""

    emulated = True

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        return Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k * dtype.itemsize


class EmulatedNVFP4(_Emulation[nvfp4.NVFP4Tensor]):
    """NVFP4 W4A4, from a weight or from the tensors of a checkpoint.

    Power-of-two global scales disappear into the exact weight; others (other tools' checkpoints) are one factor on
    the output, as on tensor cores.
    """

    name = "emulation.nvfp4"
    format = "nvfp4"

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        return "NVFP4 needs K to be a multiple of 16" if k % nvfp4.BLOCK else None

    def __init__(
        self,
        quantized: nvfp4.NVFP4Tensor,
        dtype: torch.dtype,
        activation_global_scale: float = nvfp4.ACTIVATION_GLOBAL_SCALE,
    ) -> None:
        mantissa_w, power_w = _split(float(quantized.global_scale))
        mantissa_x, _ = _split(activation_global_scale)
        self.output_scale = 1.0 / (mantissa_w * mantissa_x)
        self.activation_global_scale = activation_global_scale
        self.weight = torch.empty(quantized.shape, dtype=dtype, device=quantized.packed.device)
        self.linear = fastest_linear(self.weight.device, dtype)
        for rows in row_slices(*quantized.shape):
            self.weight[rows] = quantized.rows(rows).codes_times_scales() / power_w

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        compiling = torch.compiler.is_compiling()
        x = (_opaque_fake_quant if compiling else fake_quant_nvfp4)(x, self.activation_global_scale)
        if self.output_scale == 1.0:
            return self.linear(x, self.weight, bias)
        product = self.linear(x, self.weight, None) * self.output_scale
        return product if bias is None else product + bias


class _EmulatedRowwise(_Emulation[RowwiseTensor]):
    """FP8 and INT8: a product of codes, then per-channel and per-token scales."""

    reference: ModuleType  # the module of `formats` that defines the codes

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if dtype is torch.float16:
            return Rejected("products of codes overflow float16: load the model in bfloat16")
        return Accepted()

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k * dtype.itemsize + n * 4

    def __init__(self, quantized: RowwiseTensor, dtype: torch.dtype) -> None:
        self.weight = self.kept(quantized.codes, dtype)
        self.weight_scales = quantized.scales.flatten()
        self.linear = fastest_linear(self.weight.device, dtype)

    @staticmethod
    def kept(codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The codes as they are held between calls."""
        return codes.to(dtype)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        values = x.to(torch.float32)
        limit = self.reference.CODE_MAX
        scales = row_scales(values, limit)
        codes: Tensor = self.reference.round_codes((values * (1.0 / scales)).clamp(-limit, limit)).to(x.dtype)
        product = self.linear(codes, self.weight.to(x.dtype), None).to(torch.promote_types(x.dtype, torch.float32))
        scaled = product * scales * self.weight_scales
        return (scaled if bias is None else scaled + bias).to(x.dtype)


class EmulatedFP8(_EmulatedRowwise):
    """FP8 W8A8."""

    name, format = "emulation.fp8", "fp8"
    reference: ModuleType = fp8


class EmulatedPlane(EmulatedFP8):
    """The same for the plane of a nested weight, whose memory it shares: widened anew at each call."""

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k + n * 4

    @staticmethod
    def kept(codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes


class EmulatedInt8(_EmulatedRowwise):
    """INT8 W8A8."""

    name, format = "emulation.int8", "int8"
    reference: ModuleType = int8


def _split(global_scale: float) -> tuple[float, float]:
    """(mantissa in [1, 2), power of two) whose product is the global scale."""
    mantissa, exponent = math.frexp(global_scale)
    return 2.0 * mantissa, 2.0 ** (exponent - 1)


def fake_quant_nvfp4(x: Tensor, global_scale: float) -> Tensor:
    """Quantize and dequantize activations [rows, K] with a static global scale; dtype kept, exact in BF16.

    A global scale that is not a power of two leaves its mantissa behind, for the caller to divide the product by:
    the result is code * block scale / 2^exponent.

    On CUDA one Triton kernel. On a CPU two fused loops (block scales, then elements): one loop over both would lose its
    vectorisation to the 16-wide maximum. Blocks are the rows of a [rows * K/16, 16] view, whose inner size the compiler
    knows.
    """
    if x.device.type == "cuda" and fusion_backend("cuda") == "inductor":  # so there is Triton, and what it needs
        from mixquant.kernels import nvfp4_quantizer

        return nvfp4_quantizer.fake_quantize(x, global_scale, 1.0 / _split(global_scale)[1])
    blocks = x.reshape(-1, nvfp4.BLOCK)
    g = torch.full((), global_scale, device=x.device)
    step = torch.full((), 1.0 / _split(global_scale)[1], device=x.device)
    return _fake_quant_blocks(blocks, _block_scales(blocks, g), g, step).view(x.shape)


@torch.library.custom_op("mixquant::nvfp4_fake_quant", mutates_args=())
def _opaque_fake_quant(x: Tensor, global_scale: float) -> Tensor:
    """The same for torch.compile, which shall not look inside; outside of it, a call of an op costs more than it."""
    return fake_quant_nvfp4(x, global_scale)


@_opaque_fake_quant.register_fake
def _(x: Tensor, global_scale: float) -> Tensor:
    return torch.empty_like(x)


@fused
def _block_scales(blocks: Tensor, global_scale: Tensor) -> Tensor:
    return nvfp4.block_scales(blocks.to(torch.float32), global_scale)


@fused
def _fake_quant_blocks(blocks: Tensor, scales: Tensor, global_scale: Tensor, step: Tensor) -> Tensor:
    values = nvfp4.scaled_values(blocks.to(torch.float32), scales, global_scale)
    return (nvfp4.round_e2m1(values) * (scales.to(torch.float32) * step)).to(blocks.dtype)
