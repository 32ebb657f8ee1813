"""Quantizers of activations, fused by a compiler or not, give the bits of their format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixquant.formats import fp8, int8, nvfp4
from mixquant.kernels import LinearKernel, cpu, cuda, emulation, fusion
from tests.formats.inputs import same_bits
from tests.kernels.accuracy import EVERYTHING, accepted, activations, build, weights

G, STEP = torch.tensor(4.0), torch.tensor(0.25)
FUSED: dict[str, tuple[Callable[..., object], Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "int8 codes": (cpu._quantize_u8, lambda x: (x,)),
    "int8 epilogue": (cpu._scale_rows, lambda x: (x.float(), x.float().abs().amax(-1, keepdim=True), x[0])),
    "fp8 codes": (cuda._quantize_fp8, lambda x: (x,)),
    "nvfp4 scales": (emulation._block_scales, lambda x: (x.reshape(-1, 16), G)),
    "nvfp4 values": (
        emulation._fake_quant_blocks,
        lambda x: (x.reshape(-1, 16), nvfp4.block_scales(x.float().reshape(-1, 16), G), G, STEP),
    ),
}


def tensors(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def compiler() -> None:
    """Asked before a test counts graphs and not while tests are collected, since to ask compiles one."""
    if fusion.fusion_backend("cpu") == "eager":
        pytest.skip("no C++ compiler to fuse with")


@pytest.mark.usefixtures("compiler", "fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("function", "arguments"), FUSED.values(), ids=FUSED)
def test_fused_and_eager_quantizers_give_the_same_bits(
    function: Callable[..., object], arguments: Callable[[Tensor], tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    eager = function.__wrapped__  # type: ignore[attr-defined]
    for rows in (len(EVERYTHING), 5, 1):
        given = arguments(EVERYTHING[-rows:].to(dtype))
        assert all(map(same_bits, tensors(function(*given)), tensors(eager(*given))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2)  # one for any number of rows, one for one


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("function", "arguments"), FUSED.values(), ids=FUSED)
def test_a_quantizer_is_a_part_of_the_graph_that_calls_it(
    function: Callable[..., object], arguments: Callable[[Tensor], tuple[Tensor, ...]]
) -> None:
    """Of a compiled decode step, say: with `fullgraph`, whatever cannot be traced is an error."""
    given = arguments(EVERYTHING[:5])
    whole = torch.compile(lambda *args: function(*args), backend="eager", fullgraph=True)
    assert all(map(same_bits, tensors(whole(*given)), tensors(function(*given))))


def test_quantizers_of_kernels_give_the_bits_of_the_format() -> None:
    codes, row_scales = cpu._quantize_u8(EVERYTHING)
    assert torch.equal(codes.int() - int8.ZERO_POINT, int8.quantize(EVERYTHING).codes.int())
    assert same_bits(row_scales, int8.quantize(EVERYTHING).scales)
    codes, row_scales = cuda._quantize_fp8(EVERYTHING)
    assert same_bits(codes, fp8.quantize(EVERYTHING).codes)
    assert same_bits(row_scales, fp8.quantize(EVERYTHING).scales)
    codes, block_scales = cuda._quantize_nvfp4(EVERYTHING, float(G))  # on CUDA, a kernel: test_nvfp4_quantizer
    assert same_bits(codes, nvfp4.quantize_activation(EVERYTHING).packed)
    assert same_bits(block_scales, nvfp4.swizzle(nvfp4.quantize_activation(EVERYTHING).scales))


def test_control_the_inputs_tell_divisions_from_reciprocals() -> None:
    """The last bit of a quotient decides where some of these values go, so a compiler that reassociates would show."""
    q = int8.quantize(EVERYTHING)
    assert not torch.equal(torch.round(EVERYTHING / q.scales), q.codes.float())
    q = fp8.quantize(EVERYTHING)
    assert not same_bits((EVERYTHING / q.scales).to(torch.float8_e4m3fn), q.codes)


@pytest.mark.parametrize("kernel", accepted(torch.float32))
def test_without_a_compiler_a_kernel_gives_the_same_bits(
    kernel: type[LinearKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, built = activations(torch.float32), build(kernel, weights(torch.float32))
    y = built(x, None)
    monkeypatch.setattr(fusion, "fusion_backend", lambda device_type: "eager")
    assert same_bits(built(x, None), y)
