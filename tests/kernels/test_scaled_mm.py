"""CUDA kernels, as far as a CPU can prove them; test_cuda.py has the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mixquant.formats import nvfp4, scales
from mixquant.kernels import cuda
from mixquant.kernels.cuda import FP8ScaledMM, NVFP4DotScaled, NVFP4ScaledMM
from tests.formats.inputs import gaussian, same_bits
from tests.kernels.accuracy import activations, build, eighths, excess, reference, weights, wrong_sign
from tests.kernels.layouts import decoded


@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_scaled_mm_is_the_reference_where_torch_runs_it_on_cpu(with_bias: bool) -> None:
    x, weight = activations(torch.bfloat16), weights(torch.bfloat16)
    bias = eighths(torch.bfloat16) if with_bias else None
    y = build(FP8ScaledMM, weight)(x, bias)
    assert excess(y, reference("fp8", x, weight), bias) <= 1
    assert excess(y, reference("fp8", x, wrong_sign(weight)), bias) > 1


def nvfp4_on(device: str, weight: Tensor) -> NVFP4ScaledMM:
    q = nvfp4.quantize_weight(weight, scales.search)
    stored = nvfp4.NVFP4Tensor(q.packed.to(device), q.scales.to(device), q.global_scale.to(device))
    return NVFP4ScaledMM(stored, torch.bfloat16)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 32, 64), (9, 160, 96), (130, 128, 256)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_nvfp4_scaled_mm_passes_the_checks_of_torch(rows: int, n: int, k: int, with_bias: bool) -> None:
    """On the meta device torch checks the shapes, dtypes and strides of a call as CUDA would get it."""
    kernel = nvfp4_on("meta", gaussian(n, k).bfloat16())
    bias = torch.empty(n, dtype=torch.bfloat16, device="meta") if with_bias else None
    y = kernel(torch.empty(rows, k, dtype=torch.bfloat16, device="meta"), bias)
    assert (y.shape, y.dtype) == ((rows, n), torch.bfloat16)
    kernel.weight_scales = kernel.weight_scales[:-1]
    with pytest.raises((RuntimeError, ValueError), match="scale"):
        kernel(torch.empty(rows, k, dtype=torch.bfloat16, device="meta"), bias)


@pytest.mark.parametrize(("n", "k"), [(32, 64), (48, 96), (32, 48), (32, 80), (40, 64), (24, 32), (16, 32)])
def test_nvfp4_scaled_mm_refuses_the_shapes_that_torch_refuses(n: int, k: int) -> None:
    kernel = nvfp4_on("meta", gaussian(n, k).bfloat16())
    x = torch.empty(9, k, dtype=torch.bfloat16, device="meta")
    if NVFP4ScaledMM.unsupported(n, k) is None:
        assert kernel(x, None).shape == (9, n)
    else:
        with pytest.raises(RuntimeError, match="divisible by 16"):
            kernel(x, None)


def scaled_mm_by_the_book(a: Tensor, b: Tensor, *, scale_a: list[Tensor], scale_b: list[Tensor], **_: object) -> Tensor:
    """What scaled_mm computes, in float64, from nothing but its operands."""
    x, weight = decoded(a.view(torch.uint8), scale_a[0]), decoded(b.t().view(torch.uint8), scale_b[0])
    return (x * scale_a[1].double()) @ (weight * scale_b[1].double()).T


def test_nvfp4_scaled_mm_gets_operands_that_stand_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = activations(torch.bfloat16), weights(torch.bfloat16)
    monkeypatch.setattr(nn.functional, "scaled_mm", scaled_mm_by_the_book)
    y = nvfp4_on("cpu", weight)(x, None)
    assert excess(y, reference("nvfp4", x, weight)) <= 1
    assert excess(y, reference("nvfp4", x, wrong_sign(weight))) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [NVFP4ScaledMM, NVFP4DotScaled])
def test_a_compiled_nvfp4_product_is_one_graph_on_cuda(kernel: type[NVFP4ScaledMM]) -> None:
    """Of tensors that say they are on CUDA and have no memory: Dynamo takes the way that it takes there."""
    laid_out, graphs = kernel(nvfp4.quantize_weight(gaussian(32, 64).bfloat16()), torch.bfloat16), []

    def kept(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    def step(x: Tensor) -> Tensor:
        return laid_out(x, None) * 2

    with FakeTensorMode():
        for name, value in vars(laid_out).items():
            if isinstance(value, Tensor):
                setattr(laid_out, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))
        x = torch.empty(9, 64, dtype=torch.bfloat16, device="cuda")
        y = torch.compile(step, fullgraph=True, backend=kept)(x)
    assert (y.shape, y.dtype, y.device.type) == ((9, 32), torch.bfloat16, "cuda")
    (nodes,) = graphs
    assert "mixquant.nvfp4_quantize.default" in nodes
    assert ("mixquant.nvfp4_dot_scaled.default" in nodes) == (kernel is NVFP4DotScaled)


@pytest.mark.slow
def test_control_torch_compile_stops_where_a_rounding_is_tried() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: x * torch.equal(x, x + 1), fullgraph=True, backend="eager")(torch.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "k"), [(1, 64), (9, 96), (130, 256)])
def test_a_compiled_nvfp4_quantizer_gives_the_bits_and_the_shapes_of_the_plain_one(rows: int, k: int) -> None:
    x = gaussian(rows, k).bfloat16()
    codes, scales = torch.compile(cuda._quantize_nvfp4, fullgraph=True, backend="aot_eager")(x, 4.0)
    expected = nvfp4.quantize(x, torch.tensor(4.0))
    assert torch.equal(codes, expected.packed)
    assert same_bits(scales, nvfp4.swizzle(expected.scales))
    torch.library.opcheck(cuda._opaque_quantize, (x, 4.0), test_utils="test_faketensor")
    assert not torch.equal(codes, nvfp4.quantize(x, torch.tensor(3.7)).packed)
