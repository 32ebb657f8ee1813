"""Nested weights: joined again they are the weight, bit for bit, and the plane alone is an ordinary FP8 weight."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats import fp8, nested
from tests.formats.inputs import gaussian, outlier_channel, quick, same_bits, student_t3


def weights(change: Callable[[Tensor], None] = lambda weight: None) -> Tensor:
    weight = gaussian(k=512) * 0.02
    change(weight)
    return weight.bfloat16()


def zero_rows(weight: Tensor) -> None:
    weight[3], weight[4] = 0.0, -0.0


def subnormals(weight: Tensor) -> None:
    weight[5] *= 1e-37
    weight[6, 7] = 2.0**-133


def one_huge(weight: Tensor) -> None:
    weight[8, 9] = 3e38


def pruned_half(weight: Tensor) -> None:
    weight[:, ::2] = 0.0


WEIGHTS = {
    "gaussian": weights(),
    "student_t3": student_t3().bfloat16(),
    "outlier_columns": outlier_channel().bfloat16(),
    "outlier_rows": weights(lambda w: w[::5].mul_(1e4)),
    "pruned_half": weights(pruned_half),
    "zero_rows": weights(zero_rows),
    "subnormals": weights(subnormals),
    "one_huge": weights(one_huge),
    "largest_bf16": torch.full((16, 64), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16),
}

every_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)


@every_weight
def test_joined_planes_are_the_weight_bit_for_bit(weight: Tensor) -> None:
    assert same_bits(nested.split(weight).join(), weight)


finite = st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80)


@quick
@given(bits=arrays(np.uint16, (3, 8), elements=finite))
def test_any_finite_bits_join_again(bits: np.ndarray) -> None:
    weight = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
    assert same_bits(nested.split(weight).join(), weight)


@every_weight
def test_control_without_a_nibble_or_an_escape_the_weight_is_another(weight: Tensor) -> None:
    split = nested.split(weight)
    assert not same_bits(replace(split, nibbles=split.nibbles ^ 1).join(), weight)
    if len(split.escapes.columns):
        escapes = replace(split.escapes, differences=split.escapes.differences * 0)
        assert not same_bits(replace(split, escapes=escapes).join(), weight)


@every_weight
def test_the_plane_is_an_fp8_weight_whose_largest_code_of_a_row_is_in_the_last_binade(weight: Tensor) -> None:
    split = nested.split(weight)
    assert split.plane.dtype is torch.float8_e4m3fn
    assert split.plane.float().isfinite().all()
    assert (split.scales.log2() == split.scales.log2().round()).all()
    largest, whole = split.plane.float().abs().amax(-1), weight.float().abs().amax(-1)
    normal = whole > 2.0**-112  # below it the scale has reached its smallest, 2^-120
    assert ((largest[normal] >= 232) & (largest[normal] <= 448)).all()


def relative_mse(weight: Tensor) -> tuple[float, float]:
    """Squared error over squared weight of the plane, and of ordinary FP8 scales."""
    copies = (nested.split(weight).fp8, fp8.quantize(weight))
    plane, ordinary = (float((copy.dequantize() - weight.float()).square().sum()) for copy in copies)
    power = float(weight.float().square().sum())
    return plane / power, ordinary / power


def outlier_columns() -> Tensor:
    weight = gaussian(256, 2048)
    weight[:, ::128] *= 30
    return weight


@pytest.mark.parametrize(
    ("weight", "most"), [(gaussian(256, 2048), 1.04), (student_t3(), 1.2), (outlier_columns(), 1.4)]
)
def test_the_plane_costs_little_against_ordinary_scales(weight: Tensor, most: float) -> None:
    plane, ordinary = relative_mse(weight.bfloat16())
    assert 0.99 * ordinary < plane < most * ordinary


def test_control_the_plane_is_not_the_ordinary_fp8_weight() -> None:
    assert not same_bits(nested.split(WEIGHTS["gaussian"]).plane, fp8.quantize(WEIGHTS["gaussian"]).codes)


def test_twelve_bits_a_weight() -> None:
    split = nested.split(gaussian(256, 2048).bfloat16())
    assert 1.5 < split.nbytes / (256 * 2048) < 1.51


def test_escapes_are_what_is_below_the_fixed_point() -> None:
    weight = torch.zeros(16, 64, dtype=torch.bfloat16)
    weight[2, 0], weight[2, 5], weight[2, 6] = 1.0, 1.0078125 * 2.0**-20, 2.0**-20
    escapes = nested.split(weight).escapes
    assert escapes.rows().tolist() == [2]
    assert escapes.columns.tolist() == [5]
    assert 0 < abs(float(escapes.differences)) < 2.0**-22


def test_a_tile_of_too_many_escapes_is_told_with_its_number() -> None:
    few, many = (nested.split(WEIGHTS[name]).escapes.by_tile() for name in ("gaussian", "one_huge"))
    assert nested.too_many_escapes(few, 512) is None
    reason = nested.too_many_escapes(many, 512)
    assert reason is not None
    assert re.match(r"\d+ of 8192 weights in 16 rows are too small", reason)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (WEIGHTS["gaussian"].half(), "Only bfloat16 weights nest, not torch.float16"),
        (torch.full((16, 64), torch.nan, dtype=torch.bfloat16), "holds 1024 NaN or Inf"),
        (WEIGHTS["gaussian"][:, :33], "multiple of 2"),
    ],
)
def test_what_does_not_nest_is_refused(weight: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        nested.split(weight)
