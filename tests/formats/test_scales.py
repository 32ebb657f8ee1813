"""The search for block scales: never worse than amax, as good as trying every code, and the same bits everywhere."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from torch import Tensor

from mixquant.formats import nvfp4, scales
from tests.formats.inputs import E2M1_TIES, bits, gaussian, matrices, quick, same_bits


def block_errors(weight: Tensor, q: nvfp4.NVFP4Tensor, importance: Tensor | float = 1.0) -> Tensor:
    """Squared error of each block, columns weighted by `importance`, in float64."""
    return nvfp4.blocks((q.dequantize().double() - weight.double()).square() * importance).sum(-1)


def all_errors(weight: Tensor, global_scale: Tensor, importance: Tensor | float = 1.0) -> Tensor:
    """Squared error of each block under each of the 126 positive scales: float64 [126, N, K/16]."""
    shape = nvfp4.block_scales(weight, global_scale).shape
    codes = [torch.full(shape, code, dtype=torch.uint8).view(torch.float8_e4m3fn) for code in range(1, 127)]
    return torch.stack([block_errors(weight, nvfp4.encode(weight, global_scale, code), importance) for code in codes])


def relative_mse(weight: Tensor, rule: nvfp4.ScaleRule) -> float:
    q = nvfp4.quantize_weight(weight, rule)
    return float((q.dequantize() - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize(("rule", "known"), [("amax", 9.05e-3), ("search", 6.60e-3)])
def test_gaussian_weights_lose_what_they_are_known_to_lose(rule: str, known: float) -> None:
    assert relative_mse(gaussian(512, 512), scales.RULES[rule]) == pytest.approx(known, rel=0.03)


def test_control_one_code_above_amax_loses_more() -> None:
    def one_above(weight: Tensor, global_scale: Tensor) -> Tensor:
        return (bits(nvfp4.block_scales(weight, global_scale)) + 1).view(torch.float8_e4m3fn)

    assert relative_mse(gaussian(512, 512), one_above) > 1.03 * 9.05e-3


def test_search_is_as_good_as_trying_every_code() -> None:
    weight = gaussian(32, 256)
    q = nvfp4.quantize_weight(weight, scales.search)
    best = all_errors(weight, q.global_scale).amin(0)
    found = block_errors(weight, q)
    assert (found >= best * (1 - 1e-9)).all()
    assert found.sum() <= best.sum() * 1.001
    assert block_errors(weight, nvfp4.quantize_weight(weight)).sum() > best.sum() * 1.2  # control: amax is not


@quick
@given(matrices())
def test_search_is_never_worse_than_amax_and_stays_near_it(weight: Tensor) -> None:
    amax, found = nvfp4.quantize_weight(weight), nvfp4.quantize_weight(weight, scales.search)
    slack = 1e-5 * nvfp4.blocks(weight.double()).square().sum(-1)  # it compares errors in float32
    assert (block_errors(weight, found) <= block_errors(weight, amax) + slack).all()
    codes = bits(amax.scales).int(), bits(found.scales).int()
    assert ((codes[0] - codes[1]).abs() <= scales.RADIUS).all()
    assert ((codes[0] == 0) == (codes[1] == 0)).all()
    assert (codes[1] <= 0x7E).all()


def test_control_search_beats_amax_in_most_gaussian_blocks() -> None:
    weight = gaussian()
    amax, found = nvfp4.quantize_weight(weight), nvfp4.quantize_weight(weight, scales.search)
    assert (block_errors(weight, found) < block_errors(weight, amax)).double().mean() > 0.5


def test_amax_wins_ties() -> None:
    """A block of sixes is 6 * s, 4 * 1.5 s and 3 * 2 s, all without error: the s of amax is kept."""
    weight = torch.tensor([6.0, -6.0, 0.0, 6.0] * 8).repeat(3, 1) * torch.tensor([[1.0], [0.5], [4.0]])
    found = nvfp4.quantize_weight(weight, scales.search)
    assert (all_errors(weight, found.global_scale) == 0).sum(0).min() > 1
    assert same_bits(found.scales, nvfp4.quantize_weight(weight).scales)
    off_grid = torch.tensor((*E2M1_TIES, 6.0, 6.0))[None]
    assert not same_bits(nvfp4.quantize_weight(off_grid, scales.search).scales, nvfp4.quantize_weight(off_grid).scales)


def test_weighted_search_minimises_the_weighted_error() -> None:
    weight = gaussian(32, 256)
    importance = gaussian(1, 256, seed=1)[0].exp().square()
    q = nvfp4.quantize_weight(weight, functools.partial(scales.search, importance=importance))
    plain = nvfp4.quantize_weight(weight, scales.search)
    best = all_errors(weight, q.global_scale, importance).amin(0)
    found = block_errors(weight, q, importance)
    assert found.sum() <= best.sum() * 1.001
    assert block_errors(weight, plain, importance).sum() > best.sum() * 1.05  # control: without the weights
    assert block_errors(weight, q).sum() > block_errors(weight, plain).sum()  # and each is best at its own


def test_equal_weights_change_nothing_and_unequal_ones_do() -> None:
    weight = gaussian()
    global_scale = nvfp4.weight_global_scale(weight.abs().amax())
    plain = scales.search(weight, global_scale)
    assert same_bits(scales.search(weight, global_scale, torch.full((weight.shape[1],), 4.0)), plain)
    assert not same_bits(scales.search(weight, global_scale, torch.arange(1.0, weight.shape[1] + 1)), plain)


def test_columns_without_weight_do_not_count() -> None:
    """Only column 0 counts: it comes out more exact than it would by itself, and blocks without weight keep amax."""
    weight = gaussian()
    global_scale = nvfp4.weight_global_scale(weight.abs().amax())
    importance = torch.zeros(weight.shape[1])
    importance[0] = 1.0
    found = scales.search(weight, global_scale, importance)
    assert same_bits(found[:, 1:], nvfp4.block_scales(weight, global_scale)[:, 1:])
    error = (nvfp4.encode(weight, global_scale, found).dequantize() - weight)[:, 0].abs()
    plain = (nvfp4.encode(weight, global_scale, scales.search(weight, global_scale)).dequantize() - weight)[:, 0]
    assert error.sum() < 0.5 * plain.abs().sum()
