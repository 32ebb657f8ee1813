"""vLLM's kernels in our shape; NVFP4's is given vLLM's own emulation here, which reads what its W4A4 kernels read."""

from __future__ import annotations

import pytest
import torch
from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearLayerConfig

from mixquant.formats import nvfp4
from mixquant.integrations.vllm import kernels
from mixquant.integrations.vllm.kernels import VLLM_KERNELS, CutlassFP8, VllmNVFP4, w4a4_kernel
from mixquant.integrations.vllm.routed import refill
from mixquant.kernels.base import Rejected
from mixquant.kernels.proof import PROOFS

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


def test_every_kernel_of_the_plugin_has_a_row_of_proofs():
    assert {kernel.name for kernels in VLLM_KERNELS.values() for kernel in kernels} <= set(PROOFS)
