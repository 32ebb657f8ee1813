"""vLLM's kernels in our shape, without a GPU: NVFP4's by vLLM's own emulation, and by what its W4A4 kernels hand to the
products of CUTLASS and FlashInfer, decoded by their documented layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.nvfp4 import cutlass, flashinfer
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig

from mixquant.errors import InputError
from mixquant.formats import fp8, nvfp4
from mixquant.integrations.vllm import kernels
from mixquant.integrations.vllm.kernels import VLLM_KERNELS, W4A4_KERNELS, CutlassFP8, VllmNVFP4, w4a4_kernel
from mixquant.integrations.vllm.routed import refill
from mixquant.kernels import cuda
from mixquant.kernels.base import Rejected
from mixquant.kernels.layer import choose_kernels
from mixquant.kernels.proof import PROOFS
from mixquant.policy import Policy
from tests.kernels.layouts import decoded

CPU = torch.device("cpu")


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's emulation stand where a Blackwell GPU has a W4A4 kernel."""
    monkeypatch.setattr(
        EmulationNvFp4LinearKernel, "is_supported", classmethod(lambda cls, capability=None: (True, None))
    )
    monkeypatch.setattr(kernels, "w4a4_kernel", lambda: EmulationNvFp4LinearKernel(NvFp4LinearLayerConfig()))


def weight(seed: int) -> torch.Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16)


def test_vllms_kernel_computes_the_reference_product(emulated):
    x = weight(1)[:40]
    expected = nvfp4.quantize_activation(x).matmul(nvfp4.quantize_weight(weight(0)))
    kernel = VllmNVFP4.from_weight(weight(0), nvfp4.quantize_weight)
    torch.testing.assert_close(kernel(x, None).double(), expected, atol=0.1, rtol=2**-7)
    other = VllmNVFP4.from_weight(weight(2), nvfp4.quantize_weight)(x, None).double()
    assert (other - expected).abs().max() > 5  # control: another weight


def quant_by_the_book(
    x: Tensor, global_scale: Tensor, padded_n: int | None = None, **_: object
) -> tuple[Tensor, Tensor]:
    """vLLM's `scaled_fp4_quant`: codes, and block scales in tiles."""
    assert padded_n in (None, x.shape[1])
    quantized = nvfp4.quantize(x, global_scale)
    return quantized.packed, nvfp4.swizzle(quantized.scales)


def product_by_the_book(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, alpha: Tensor, dtype: torch.dtype, backend: str = ""
) -> Tensor:
    """`cutlass_scaled_fp4_mm` and `flashinfer_scaled_fp4_mm`, from nothing but their operands."""
    return alpha.double() * (decoded(a, scale_a) @ decoded(b, scale_b).T)


@pytest.mark.parametrize(
    ("module", "name", "product"),
    [
        (cutlass, "CutlassNvFp4LinearKernel", "cutlass_scaled_fp4_mm"),
        (flashinfer, "FlashInferCutlassNvFp4LinearKernel", "flashinfer_scaled_fp4_mm"),
        (flashinfer, "FlashInferCuteDslNvFp4LinearKernel", "flashinfer_scaled_fp4_mm"),
    ],
)
def test_w4a4_kernels_get_operands_that_stand_for_the_reference(module, name, product, monkeypatch):
    monkeypatch.setattr(module, "scaled_fp4_quant", quant_by_the_book)
    monkeypatch.setattr(module, product, product_by_the_book)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)  # vLLM swizzles on the GPU
    found = getattr(module, name)
    monkeypatch.setattr(found, "is_supported", classmethod(lambda cls, capability=None: (True, None)))
    monkeypatch.setattr(kernels, "w4a4_kernel", lambda: found(NvFp4LinearLayerConfig()))
    assert name in W4A4_KERNELS
    x, wide = weight(1)[:40], torch.cat([weight(0), weight(3), weight(4)])  # 192 rows: two tiles, one not full
    kernel = VllmNVFP4.from_weight(wide, nvfp4.quantize_weight)
    expected = nvfp4.quantize_activation(x).matmul(nvfp4.quantize_weight(wide))
    torch.testing.assert_close(kernel(x, None).double(), expected, atol=1e-9, rtol=1e-9)
    kernel.layer.weight_scale.data.view(torch.uint8)[0, 0] ^= 8  # control: one scale of one block
    assert (kernel(x, None).double() - expected).abs().max() > 0.01


def test_cutlass_fp8_gets_operands_that_stand_for_the_reference(monkeypatch):
    def quant(x: Tensor, use_per_token_if_dynamic: bool) -> tuple[Tensor, Tensor]:
        quantized = fp8.quantize(x)
        return quantized.codes, quantized.scales

    def product(out: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> None:
        assert b.stride() == (1, b.shape[0])  # column by column
        out.copy_((a.double() * scale_a.double()) @ (b.double() * scale_b.double().T))

    monkeypatch.setattr(ops, "scaled_fp8_quant", quant)
    monkeypatch.setattr(torch.ops._C, "cutlass_scaled_mm", product, raising=False)
    x, out = weight(1)[:40], torch.empty(40, 64, dtype=torch.float64)
    kernel, expected = CutlassFP8.from_weight(weight(0), fp8.quantize), fp8.quantize(x).matmul(fp8.quantize(weight(0)))
    kernel.into(out, x, None)
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    kernel.weight_scales = kernel.weight_scales.roll(1, 0)  # control
    kernel.into(out, x, None)
    assert (out - expected).abs().max() > 0.01


def test_a_reload_keeps_the_addresses(emulated):
    kernel, fresh = (
        VllmNVFP4.from_weight(weight(0), nvfp4.quantize_weight),
        VllmNVFP4.from_weight(weight(2), nvfp4.quantize_weight),
    )
    addresses, x = [tensor.data_ptr() for tensor in kernel.tensors()], weight(1)
    before = kernel(x, None)
    refill(kernel, fresh)
    assert [tensor.data_ptr() for tensor in kernel.tensors()] == addresses
    assert torch.equal(kernel(x, None), fresh(x, None))
    assert not torch.equal(kernel(x, None), before)


def test_without_a_gpu_each_says_why_and_emulation_follows():
    for format, native in (("nvfp4", VllmNVFP4), ("fp8", CutlassFP8)):
        verdict = native.check(CPU, torch.bfloat16)
        assert isinstance(verdict, Rejected)
        assert "runs on CUDA, not on cpu" in verdict.reason
        assert VLLM_KERNELS[format][0] is native
        assert VLLM_KERNELS[format][-1].emulated
    assert w4a4_kernel() is None


def test_a_vllm_without_fp4_says_why_in_its_own_words_and_what_to_install(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    verdict = VllmNVFP4.check(torch.device("cuda", 0), torch.bfloat16)
    assert isinstance(verdict, Rejected)
    assert "(CUTLASS FP4 kernels not available)" in verdict.reason
    assert verdict.reason.endswith("install a vLLM that is built for CUDA 12.9 or newer")


@pytest.mark.parametrize(
    ("shape", "with_triton", "without"),
    [
        ((64, 128), "vllm.nvfp4", "vllm.nvfp4"),
        ((48, 64), "torch.scaled_mm.nvfp4", None),
        ((32, 48), "triton.dot_scaled.nvfp4", None),
        ((40, 64), None, None),
        ((64, 40), None, None),
    ],
)
def test_a_layer_of_no_multiples_of_32_gets_another_kernel_or_is_named(
    shape, with_triton, without, emulated, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda, "fusion_backend", lambda device_type: "inductor")
    monkeypatch.setattr(cuda, "versions", lambda names: dict.fromkeys(names, "3.8.0"))
    policy = Policy(prefill="nvfp4")
    for triton, expected in ((True, with_triton), (False, without)):
        monkeypatch.setattr(cuda, "installed", lambda name, triton=triton: triton)
        chosen = choose_kernels(policy, shape, torch.device("cuda", 0), torch.bfloat16, VLLM_KERNELS)
        if expected is not None:
            chosen.check(policy, "model.x", shape)
            assert chosen.prefill.name == expected
            continue
        with pytest.raises(InputError) as error:
            chosen.check(policy, "model.x", shape)
        # What the last kernel that runs there would take: the fewest demands.
        needs = "this FP4 product needs N and K to be multiples of 16"
        if not triton:
            needs = "NVFP4 kernels need N and K to be multiples of 32"
        assert str(error.value) == f"model.x of shape {list(shape)}: {needs}: add it to `ignore`."


def test_every_kernel_of_the_plugin_has_a_row_of_proofs():
    assert {kernel.name for kernels in VLLM_KERNELS.values() for kernel in kernels} <= set(PROOFS)
