"""CUDA kernels, as far as a CPU can prove them; test_cuda.py has the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mixquant.formats import nvfp4, scales
from mixquant.kernels.cuda import FP8ScaledMM, NVFP4ScaledMM
from tests.formats.inputs import gaussian
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
