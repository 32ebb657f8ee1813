"""CUDA kernels: torch's scaled matrix products, FP8 row-wise (Ada, Hopper, Blackwell) and NVFP4 (Blackwell), and a
product by Triton for NVFP4 where torch has none, or none for a layer's shape.

What. Activations are quantized in one fused pass, row by row independent; then one product on tensor cores takes the
codes of both sides, applies their scales, adds the bias and rounds once to BF16.
Layout. Tensor cores of 8 and 4 bits read both operands along K, so `a` is row-major [M, K] and `b` column-major [K, N]:
the transpose of our weight [N, K] as it stands, without a copy. NVFP4's block scales are swizzled into 128x4 tiles.
Versions. Code for a GPU needs a CUDA that knows it; Triton brings its own assembler, and so stands in where torch is
built for an older CUDA.
Trade-off. NVFP4 is W4A4 or nothing: where a GPU has no FP4 tensor cores the kernel answers Rejected, because a
weight-only fallback would give other numbers under the same name.
State. `proof` says on what each has run. What a CPU shows of the NVFP4 kernel: its operands, decoded by their
documented layout, are the float64 reference's, and torch's meta device takes their shapes, strides and dtypes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mixquant.formats import fp8, nvfp4
from mixquant.formats.rowwise import RowwiseTensor, row_scales
from mixquant.kernels.base import Accepted, QuantizedKernel, Rejected, Verdict
from mixquant.kernels.fusion import fused, fusion_backend
from mixquant.packages import installed, versions


def reject_unless_fp8(device: torch.device) -> Rejected | None:
    """The answer of a kernel that needs FP8 tensor cores to a CUDA device without them."""
    found = torch.cuda.get_device_capability(device)
    if found >= (8, 9):
        return None
    return Rejected(f"needs a GPU with FP8 (8.9: Ada, Hopper, Blackwell), not {found[0]}.{found[1]}")


CUDA_FOR_FP4 = {(10, 0): (12, 8), (10, 3): (12, 9), (12, 0): (12, 8), (12, 1): (12, 9)}
"""The first CUDA that assembles code for each Blackwell GPU; one that is not listed is newer than CUDA 12."""

TRITON_FOR_FP4 = {(10, 0): (3, 6), (10, 3): (3, 6), (12, 0): (3, 6), (12, 1): (3, 8)}
"""The first Triton whose `tl.dot_scaled` becomes the FP4 instruction there. Seen ahead of time, without the GPUs: 3.6.0
(once) and 3.7.1 (in every `make test`) compile it for the first three and nothing for 12.1, 3.8.0 for 12.1 too."""


def reject_unless_fp4(device: torch.device) -> Rejected | None:
    """The answer of a kernel that needs FP4 tensor cores to a CUDA device without them."""
    found = torch.cuda.get_device_capability(device)
    if found >= (10, 0):
        return None
    return Rejected(f"needs FP4 tensor cores (Blackwell, 10.0), not {found[0]}.{found[1]}")


def cuda_for_fp4(device: torch.device) -> tuple[int, int]:
    """The first CUDA that assembles FP4 for a Blackwell GPU."""
    return CUDA_FOR_FP4.get(torch.cuda.get_device_capability(device), (13, 0))


def reject_old_cuda(device: torch.device) -> Rejected | None:
    """The answer of a kernel that torch brings where torch's CUDA is older than the GPU's FP4."""
    needed, built = cuda_for_fp4(device), torch.version.cuda or "0.0"
    if _numbers(built) >= needed:
        return None
    return Rejected(f"this torch is built for CUDA {built}: install one for CUDA {needed[0]}.{needed[1]} or newer")


def reject_unless_triton() -> Rejected | None:
    """The answer of a kernel that quantizes activations with Triton to a machine where Triton compiles nothing."""
    if not installed("triton"):
        return Rejected("quantizes activations with Triton: pip install triton")
    if fusion_backend("cuda") == "eager":
        return Rejected("Triton compiles nothing here: install g++ and the headers of this Python (python3-dev)")
    return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def reject_unless_bf16_cuda(device: torch.device, dtype: torch.dtype) -> Rejected | None:
    """The answer of a kernel that multiplies BF16 on CUDA to anything else."""
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
        return reject_unless_bf16_cuda(device, dtype) or reject_unless_fp8(device) or Accepted()

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
            codes,  # E4M3 [M, K], row-major
            self.weight.t(),  # E4M3 [K, N], column-major: a view of [N, K]
            scale_a=scales,  # float32 [M, 1]: this shape is what asks for row-wise scaling
            scale_b=self.weight_scales,  # float32 [1, N]
            bias=bias,  # added in the epilogue
            out_dtype=x.dtype,
            use_fast_accum=False,  # fast sums keep fewer bits than float32 between instructions
        )


class NVFP4ScaledMM(QuantizedKernel[nvfp4.NVFP4Tensor]):
    """NVFP4 W4A4 by torch.nn.functional.scaled_mm."""

    name = "torch.scaled_mm.nvfp4"
    format = "nvfp4"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        rejected = reject_unless_bf16_cuda(device, dtype) or reject_unless_fp4(device) or reject_old_cuda(device)
        return rejected or reject_unless_triton() or Accepted()

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        return "torch multiplies FP4 where N is a multiple of 16 and K of 32" if n % 16 or k % 32 else None

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k // 2 + -(-n // 128) * 128 * -(-k // 64) * 4 + 2 * 4

    def __init__(
        self,
        quantized: nvfp4.NVFP4Tensor,
        dtype: torch.dtype,
        activation_global_scale: float = nvfp4.ACTIVATION_GLOBAL_SCALE,
    ) -> None:
        self.activation_global_scale, self.dtype = activation_global_scale, dtype
        self.weight = quantized.packed
        self.weight_scales = nvfp4.swizzle(quantized.scales)
        self.weight_decode = (1.0 / quantized.global_scale).reshape(1)
        # On the device once: made at each call it would be a launch more.
        self.input_decode = torch.full_like(quantized.global_scale, 1.0 / activation_global_scale).reshape(1)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return self.multiply(_quantize_nvfp4(x, self.activation_global_scale), bias)

    def multiply(self, operands: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        """The product of activations that are quantized already: codes, and scales in tiles (`_quantize_nvfp4`)."""
        codes, scales = operands
        block, tensor = nn.functional.ScalingType.BlockWise1x16, nn.functional.ScalingType.TensorWise
        swizzled, plain = nn.functional.SwizzleType.SWIZZLE_32_4_4, nn.functional.SwizzleType.NO_SWIZZLE
        return nn.functional.scaled_mm(
            codes.view(torch.float4_e2m1fn_x2),  # [M, K/2] row-major; an element is two codes, low nibble = even k
            self.weight.view(torch.float4_e2m1fn_x2).t(),  # [K/2, N], column-major: a view of [N, K/2]
            # Two scales a side, in the order of their recipes: value = code * block scale * tensor scale. The first is
            # E4M3, flat, in whole tiles of 128 rows; the second float32 [1], 1 / g.
            scale_a=[scales, self.input_decode],
            scale_recipe_a=[block, tensor],
            swizzle_a=[swizzled, plain],  # cuBLASLt reads block scales in 128x4 tiles only; one number has no order
            scale_b=[self.weight_scales, self.weight_decode],
            scale_recipe_b=[block, tensor],
            swizzle_b=[swizzled, plain],
            bias=bias,
            output_dtype=self.dtype,  # the sum is float32; BF16 is the only rounding
        )


class NVFP4DotScaled(NVFP4ScaledMM):
    """NVFP4 W4A4 by `tl.dot_scaled`, on the same operands as torch's product (`nvfp4_product` explains it)."""

    name = "triton.dot_scaled.nvfp4"

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        return "this FP4 product needs N and K to be multiples of 16" if n % 16 or k % nvfp4.BLOCK else None

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if rejected := reject_unless_bf16_cuda(device, dtype) or reject_unless_fp4(device):
            return rejected
        if rejected := reject_unless_triton():
            return rejected
        found, capability = versions(["triton"])["triton"] or "0.0", torch.cuda.get_device_capability(device)
        if capability not in TRITON_FOR_FP4:
            return Rejected(f"no Triton is known to compile it for {capability[0]}.{capability[1]}")
        needed = TRITON_FOR_FP4[capability]
        if _numbers(found) < needed:
            return Rejected(f"needs Triton {needed[0]}.{needed[1]} or newer on this GPU, not {found}")
        return Accepted()

    def multiply(self, operands: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        weight = (self.weight, self.weight_scales, self.weight_decode)
        multiply = _opaque_product if torch.compiler.is_compiling() else _product
        found: Tensor = multiply(*operands, self.input_decode, *weight, bias, self.dtype)
        return found


def _product(
    codes: Tensor,
    scales: Tensor,
    decode: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    weight_decode: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    from mixquant.kernels import nvfp4_product  # Triton comes with CUDA builds of torch only

    return nvfp4_product.product(codes, scales, decode, weight, weight_scales, weight_decode, bias, dtype)


_opaque_product = torch.library.custom_op("mixquant::nvfp4_dot_scaled", _product, mutates_args=())
"""The same for torch.compile, which cannot look inside: the launch chooses a device."""


@_opaque_product.register_fake
def _(codes: Tensor, scales: Tensor, decode: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=rest[-1])


@fused
def _quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """`formats.fp8.quantize`, fused: float8_e4m3fn [rows, K], float32 [rows, 1]."""
    x = x.to(torch.float32)
    scales = row_scales(x, fp8.CODE_MAX)
    codes = (x * (1.0 / scales)).clamp(-fp8.CODE_MAX, fp8.CODE_MAX)
    return codes.to(torch.float8_e4m3fn), scales


def _quantize_nvfp4(x: Tensor, global_scale: float) -> tuple[Tensor, Tensor]:
    """Activations as the tensor cores read them: uint8 [rows, K/2]; float8_e4m3fn, flat, swizzled."""
    found: tuple[Tensor, Tensor] = (_opaque_quantize if torch.compiler.is_compiling() else _quantize)(x, global_scale)
    return found


def _quantize(x: Tensor, global_scale: float) -> tuple[Tensor, Tensor]:
    if x.device.type == "cuda":
        from mixquant.kernels import nvfp4_quantizer  # Triton comes with CUDA builds of torch only

        return nvfp4_quantizer.quantize(x, global_scale, nvfp4_quantizer.rounds_in_hardware(x.device))
    values, scale = x.to(torch.float32), torch.tensor(global_scale)
    quantized = nvfp4.encode(values, scale, nvfp4.block_scales(values, scale))
    return quantized.packed, nvfp4.swizzle(quantized.scales)


@torch.library.custom_op("mixquant::nvfp4_quantize", mutates_args=())
def _opaque_quantize(x: Tensor, global_scale: float) -> tuple[Tensor, Tensor]:
    """The same for torch.compile, which cannot look inside: how a GPU rounds is tried once, on the host."""
    return _quantize(x, global_scale)


@_opaque_quantize.register_fake
def _(x: Tensor, global_scale: float) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    tiles = -(-rows // 128) * -(-columns // 64)
    codes = x.new_empty(rows, columns // 2, dtype=torch.uint8)
    return codes, x.new_empty(tiles * 512, dtype=torch.float8_e4m3fn)
