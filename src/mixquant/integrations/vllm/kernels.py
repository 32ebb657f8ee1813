"""vLLM's own quantized kernels in the shape of `mixquant.kernels`, and the order in which the plugin takes them.

FP8 by CUTLASS (`cutlass_scaled_mm`, per output channel and per token), NVFP4 by whichever of vLLM's kernels multiplies
four-bit weights by four-bit activations. Weight-only kernels such as Marlin read NVFP4 checkpoints too, but compute in
BF16, so they are Rejected. Emulation and the CPU's INT8 are `mixquant.kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixquant.formats import nvfp4
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.kernels import KERNELS, Table
from mixquant.kernels.base import Accepted, QuantizedKernel, Rejected, Verdict
from mixquant.kernels.cuda import FP8ScaledMM, cuda_for_fp4, reject_unless_fp4

W4A4_KERNELS = (
    "FlashInferCuteDslNvFp4LinearKernel",
    "FlashInferCutlassNvFp4LinearKernel",
    "CutlassNvFp4LinearKernel",
)
"""vLLM's kernels for true W4A4, in vLLM's own order, by class name.

All take activations of one quantizer, in one layout. FlashInfer's TRT-LLM kernel does not, and is left out: for 32
rows or fewer vLLM gives it another quantizer's, in another layout, so that a token's result would depend on its batch.
"""


class CutlassFP8(FP8ScaledMM):
    """FP8 W8A8 by vLLM's CUTLASS kernels."""

    name = "vllm.cutlass_fp8"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if device.type != "cuda":
            return Rejected(f"runs on CUDA, not on {device.type}")
        if dtype not in (torch.bfloat16, torch.float16):
            return Rejected(f"multiplies into bfloat16 or float16, not {dtype}")
        from vllm.model_executor.layers.quantization.utils.w8a8_utils import cutlass_fp8_supported

        return Accepted() if cutlass_fp8_supported() else Rejected("vLLM has no CUTLASS FP8 kernel for this GPU")

    def __init__(self, quantized: RowwiseTensor, dtype: torch.dtype) -> None:
        self.weight = quantized.codes
        self.weight_scales = quantized.scales

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = x.new_empty(x.shape[0], self.weight.shape[0])
        self.into(out, x, bias)
        return out

    def into(self, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """The product, written to `out` [rows, N]."""
        from vllm import _custom_ops as ops

        # No scale is given, so it is dynamic, and one a row: [rows, 1], the counterpart of one an output channel.
        codes, scales = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        # The op under `ops.cutlass_scaled_mm`, which would allocate a result of its own.
        # CUTLASS wants the second operand [K, N] column by column: that is our [N, K] row by row, seen transposed.
        torch.ops._C.cutlass_scaled_mm(out, codes, self.weight.t(), scales, self.weight_scales, bias)


class VllmNVFP4(QuantizedKernel[nvfp4.NVFP4Tensor]):
    """NVFP4 W4A4 by the best of vLLM's kernels for this GPU."""

    name = "vllm.nvfp4"
    format = "nvfp4"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if device.type != "cuda":
            return Rejected(f"runs on CUDA, not on {device.type}")
        if rejected := reject_unless_fp4(device):
            return rejected
        return Accepted() if w4a4_kernel() else Rejected(_no_w4a4_kernel(device))

    @classmethod
    def unsupported(cls, n: int, k: int) -> str | None:
        return "NVFP4 kernels need N and K to be multiples of 32" if n % 32 or k % 32 else None

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        return n * k // 2 + n * k // nvfp4.BLOCK

    def __init__(
        self,
        quantized: nvfp4.NVFP4Tensor,
        dtype: torch.dtype,
        activation_global_scale: float = nvfp4.ACTIVATION_GLOBAL_SCALE,
    ) -> None:
        self.kernel = w4a4_kernel()
        assert self.kernel is not None
        self.name = f"vllm.{type(self.kernel).__name__}"  # type: ignore[misc]  # which of them it is, for the log
        self.layer = checkpoint_layer(quantized, activation_global_scale)
        self.kernel.process_weights_after_loading(self.layer)  # swizzles scales and pads, each kernel in its own way

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = self.kernel.apply_weights(self.layer, x, bias)
        return out

    def tensors(self) -> Iterator[Tensor]:
        return self.layer.parameters()


def w4a4_kernel() -> Any:
    """An instance of vLLM's best W4A4 kernel that runs here, or None."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig

    if not linear.CutlassNvFp4LinearKernel.is_supported()[0]:
        return None  # the quantizer of activations, which all of them need, is built together with this one
    config = NvFp4LinearLayerConfig()  # asks for nothing special
    for name in W4A4_KERNELS:
        kernel = getattr(linear, name, None)
        if kernel is not None and kernel.is_supported()[0] and kernel.can_implement(config)[0]:
            return kernel(config)
    return None


def _no_w4a4_kernel(device: torch.device) -> str:
    """Why vLLM has none, in its own words, and what to do."""
    import vllm
    from vllm.model_executor.kernels.linear import CutlassNvFp4LinearKernel

    needed = ".".join(map(str, cuda_for_fp4(device)))
    return (
        f"vLLM {vllm.__version__} has no W4A4 kernel for this GPU ({CutlassNvFp4LinearKernel.is_supported()[1]}): "
        f"install a vLLM that is built for CUDA {needed} or newer"
    )


def checkpoint_layer(quantized: nvfp4.NVFP4Tensor, activation_global_scale: float) -> nn.Module:
    """A layer as vLLM's NVFP4 kernels expect it once a checkpoint is loaded.

    Our global scales multiply before rounding, and so does what vLLM calls an inverse; its other ones divide.
    """
    n, k = quantized.shape
    layer = nn.Module()
    tensors = {
        "weight": quantized.packed,
        "weight_scale": quantized.scales,
        "weight_global_scale": 1.0 / quantized.global_scale,
        "input_global_scale_inv": torch.full_like(quantized.global_scale, activation_global_scale),
        "input_global_scale": torch.full_like(quantized.global_scale, 1.0 / activation_global_scale),
        "alpha": 1.0 / (quantized.global_scale * activation_global_scale),  # takes both out of the product again
    }
    for name, tensor in tensors.items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    layer.input_size_per_partition, layer.output_size_per_partition = k, n  # type: ignore[assignment]
    layer.logical_widths = [n]  # type: ignore[assignment]  # one part, even of q, k and v: they share a global scale
    layer.params_dtype = torch.bfloat16  # type: ignore[assignment]  # of the layer; the result takes x's
    return layer


VLLM_KERNELS: Table = KERNELS | {  # type: ignore[operator]
    "nvfp4": (VllmNVFP4, *KERNELS["nvfp4"]),
    "fp8": (CutlassFP8, *KERNELS["fp8"]),
}
"""The plugin's kernels by format, in order of preference."""
