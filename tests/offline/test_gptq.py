"""GPTQ: better than search on its objective and on new tokens, its equal where nothing is to be gained, never stuck."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats import nvfp4, scales
from mixquant.formats.error import sqnr
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.offline import gptq
from tests.formats.inputs import gaussian, same_bits

ROWS, K, TOKENS = 48, 128, 4096


def correlated(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """Inputs that lie near a third of their dimensions."""
    mix = gaussian(K, K, seed=99) @ torch.diag(torch.linspace(0, 1, K) ** 8) @ gaussian(K, K, seed=98)
    return gaussian(tokens, K, seed) @ mix + 0.1 * gaussian(tokens, K, seed + 1)


def dominant_channels(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    """The last channels carry nearly everything, as in a model's first down_proj."""
    return correlated(tokens, seed) * torch.logspace(-2, 2, K)


def white(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return gaussian(tokens, K, seed)


def few_tokens(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return correlated(5, seed)


def dead_channels(tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return correlated(tokens, seed) * (torch.arange(K) % 3 > 0)


INPUTS = (correlated, dominant_channels, white, few_tokens, dead_channels)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def global_scale(weight: Tensor) -> Tensor:
    return nvfp4.weight_global_scale(weight.abs().amax())


def quantize(weight: Tensor, hessian: Tensor, scale: Tensor, tokens: int) -> NVFP4Tensor:
    return gptq.quantize(weight, gptq.factor_(hessian.clone(), tokens), scale)


def by_gptq(weight: Tensor, x: Tensor) -> NVFP4Tensor:
    return quantize(weight, moment(x), global_scale(weight), len(x))


def by_search(weight: Tensor, x: Tensor) -> NVFP4Tensor:
    return nvfp4.quantize_weight(weight, functools.partial(scales.search, importance=moment(x).diagonal()))


def error(weight: Tensor, q: NVFP4Tensor, x: Tensor) -> float:
    """Share of the power of the layer's output on `x` that is error."""
    exact = x.double() @ weight.double().T
    return float((x.double() @ q.dequantize().double().T - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("inputs", INPUTS, ids=lambda inputs: inputs.__name__)
@pytest.mark.parametrize("weight", [gaussian(ROWS, K, seed=7), gaussian(ROWS, K, seed=7) ** 3], ids=["normal", "cubed"])
def test_its_objective_is_not_worse_than_weighted_search(inputs, weight: Tensor) -> None:
    x = inputs()
    assert error(weight, by_gptq(weight, x), x) < error(weight, by_search(weight, x), x)


@pytest.mark.parametrize(("inputs", "gain"), [(correlated, 6.0), (dominant_channels, 6.0), (white, -0.3)])
def test_gain_on_new_tokens_in_decibels(inputs, gain: float) -> None:
    """White inputs leave nothing to gain: there GPTQ must only not fit the noise of its Hessian."""
    weight, seen, new = gaussian(ROWS, K, seed=7), inputs(), inputs(seed=10)
    before, after = error(weight, by_search(weight, seen), new), error(weight, by_gptq(weight, seen), new)
    assert sqnr(after) > sqnr(before) + gain


def test_damping_by_the_number_of_tokens_keeps_it_from_fitting_noise() -> None:
    weight, seen, new = gaussian(ROWS, K, seed=7), white(2 * K), white(seed=10)
    honest = quantize(weight, moment(seen), global_scale(weight), len(seen))
    deceived = quantize(weight, moment(seen), global_scale(weight), 10**9)
    assert error(weight, honest, new) < 0.9 * error(weight, deceived, new)
    assert error(weight, honest, seen) > error(weight, deceived, seen)


@pytest.mark.parametrize("hessian", [torch.zeros(K, K), torch.eye(K), 1e-20 * torch.eye(K)])
def test_uncorrelated_inputs_of_one_size_leave_the_plain_search(hessian: Tensor) -> None:
    weight = gaussian(ROWS, K)
    plain = nvfp4.quantize_weight(weight, scales.search)
    found = quantize(weight, hessian, plain.global_scale, TOKENS)
    assert same_bits(found.scales, plain.scales)
    assert torch.equal(found.dequantize(), plain.dequantize())
    assert not same_bits(by_gptq(weight, correlated()).scales, plain.scales)  # control: correlation changes scales


def damped(hessian: Tensor) -> Tensor:
    """What GPTQ factors, for TOKENS calibration tokens."""
    power = hessian.diagonal()
    return hessian + torch.diag(len(power) / TOKENS * power + gptq.DAMPING * power.mean())


def textbook(weight: Tensor, hessian: Tensor, steps: Tensor) -> Tensor:
    """Optimal brain quantization by its definition: after each column, solve anew for the columns that are left."""
    left, rounded = weight.double().clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = nvfp4.round_e2m1((left[:, j] / steps[:, j]).float()) * steps[:, j]
        inverse = torch.linalg.inv(hessian[j:, j:].double())
        left[:, j:] -= ((left[:, j] - rounded[:, j]) / inverse[0, 0]).unsqueeze(-1) * inverse[0]
    return rounded


def test_its_codes_are_those_of_the_textbook_under_its_scales() -> None:
    x = correlated()[:, :64] * torch.linspace(2, 1, 64)  # blocks in order of their power
    weight, hessian = gaussian(ROWS, 64, seed=3), moment(x)
    q = quantize(weight, hessian, global_scale(weight), TOKENS)
    steps = (q.scales.float() / q.global_scale).repeat_interleave(16, dim=1)
    assert torch.equal(q.dequantize(), textbook(weight, damped(hessian), steps))
    uncorrelated = torch.diag(hessian.diagonal())
    assert not torch.equal(q.dequantize(), textbook(weight, uncorrelated, steps))  # control: without feedback


def test_a_block_gets_the_scale_with_the_least_objective() -> None:
    weight, hessian = gaussian(ROWS, 16, seed=3), moment(dominant_channels()[:, :16] * torch.logspace(0, 2, 16))
    q = quantize(weight, hessian, global_scale(weight), TOKENS)
    steps = scales.candidates(weight, q.global_scale).float() / q.global_scale
    rounded = torch.stack([textbook(weight, damped(hessian), step.expand(-1, 16)) for step in steps])
    objectives = ((weight - rounded) @ damped(hessian) * (weight - rounded)).sum(-1)
    error = weight - q.dequantize()
    found = (error @ damped(hessian) * error).sum(-1)
    torch.testing.assert_close(found, objectives.amin(0), rtol=1e-4, atol=0)
    assert found.sum() < 0.9 * objectives[0].sum()  # control: amax, the first candidate


def test_the_same_input_gives_the_same_bits() -> None:
    weight, x = gaussian(ROWS, K), correlated()
    first, second = by_gptq(weight, x), by_gptq(weight, x)
    assert same_bits(first.packed, second.packed)
    assert same_bits(first.scales, second.scales)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, x = gaussian(ROWS, K), correlated()
    whole, half = by_gptq(weight, x), quantize(weight[7:9], moment(x), global_scale(weight), TOKENS)
    assert same_bits(whole.packed[7:9], half.packed)
    assert not same_bits(whole.packed[8:10], half.packed)


@pytest.mark.parametrize("place", [(0, 0), (3, 5)])
def test_a_hessian_with_nan_is_refused(place: tuple[int, int]) -> None:
    hessian = torch.eye(K)
    hessian[place] = torch.nan
    with pytest.raises(InputError, match="The mean of x x"):
        gptq.factor_(hessian, TOKENS)


def test_an_indefinite_hessian_is_damped_until_it_is_none() -> None:
    hessian = torch.eye(K) - 1.5 * torch.eye(K).flip(0)
    assert torch.linalg.eigvalsh(hessian).amin() < -0.4
    weight = gaussian(ROWS, K)
    q = quantize(weight, hessian, global_scale(weight), TOKENS)
    assert error(weight, q, torch.eye(K)) < 0.1


def test_zero_weights_stay_zero() -> None:
    weight = gaussian(ROWS, K)
    weight[:, 32:64] = 0.0
    weight[5] = 0.0
    x = white()
    x[:, 32:64] = 0.0
    values = by_gptq(weight, x).dequantize()
    assert (values[:, 32:64] == 0).all()
    assert (values[5] == 0).all()


@pytest.mark.parametrize("size", [16, 1504])
def test_factors_multiply_to_the_damped_matrix(size: int) -> None:
    """In the order of the blocks; 1,504 columns take more than one chunk of rows."""
    x = gaussian(2 * size, size) * torch.logspace(-1, 1, size)
    hessian = moment(x)
    found = gptq.factor_(hessian.clone(), TOKENS)
    expected = hessian + torch.diag(size / TOKENS * hessian.diagonal())
    expected = (expected / hessian.diagonal().mean())[found.columns][:, found.columns]
    expected.diagonal().add_(gptq.DAMPING)
    assert torch.equal(found.feedback, found.feedback.triu())
    torch.testing.assert_close(found.feedback * found.importance @ found.feedback.T, expected, rtol=1e-3, atol=1e-4)
    assert found.order[0] == size // 16 - 1
