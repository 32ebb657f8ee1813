"""FP8 and INT8: brute force over all codes judges the quantizers, float64 the product."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats import fp8, int8
from mixquant.formats.rowwise import RowwiseTensor
from tests.formats.inputs import INPUTS, bits, gaussian, matrices, outlier_channel, quick, same_bits

GRIDS = {
    fp8: torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double(),
    int8: torch.arange(-127, 128).double(),
}
"""Every value that a code of a format can have (two of FP8's are NaN)."""

both = pytest.mark.parametrize("format", GRIDS, ids=lambda module: module.__name__.rpartition(".")[2])


def excess_error(x: Tensor, q: RowwiseTensor, grid: Tensor) -> float:
    """How much further than the nearest code the chosen codes lie from x, in scales: 0 up to float32 rounding."""
    scaled = x.double() / q.scales.double()
    nearest = (scaled.unsqueeze(-1) - grid[grid.isfinite()]).abs().amin(-1)
    return float(((scaled - q.codes.double()).abs() - nearest).max())


# x * (1 / scale) rounds twice, so x may land on the wrong side of the middle between two codes, by 2 * 2^-24 of 448.
ROUNDING = 2 * 448 * 2.0**-24


@both
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_every_code_is_the_nearest(make: Callable[[], Tensor], format: ModuleType) -> None:
    x = make()
    assert excess_error(x, format.quantize(x), GRIDS[format]) <= ROUNDING


@both
def test_control_the_neighbour_of_one_code_is_not_the_nearest(format: ModuleType) -> None:
    x = gaussian()
    q = format.quantize(x)
    flipped = bits(q.codes)
    flipped[0, 0] ^= 1
    neighbour = RowwiseTensor(flipped.view(q.codes.dtype), q.scales)
    assert excess_error(x, neighbour, GRIDS[format]) > 100 * ROUNDING


@both
@quick
@given(x=matrices(multiple=5))
def test_any_finite_matrix_has_finite_codes_and_rows_that_do_not_touch(format: ModuleType, x: Tensor) -> None:
    q, last = format.quantize(x), format.quantize(x[-1:])
    assert q.dequantize().isfinite().all()
    assert (q.codes.float().abs() <= format.CODE_MAX).all()
    assert same_bits(q.codes[-1:], last.codes)
    assert same_bits(q.scales[-1:], last.scales)


@both
def test_control_scales_follow_the_row(format: ModuleType) -> None:
    x = outlier_channel()
    assert not same_bits(format.quantize(x).scales, format.quantize(x.roll(1, 0)).scales)


@both
def test_the_largest_of_a_row_gets_the_largest_code(format: ModuleType) -> None:
    x = gaussian()
    assert (format.quantize(x).codes.float().abs().amax(-1) == format.CODE_MAX).all()


@both
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-45])
def test_a_row_of_nothing_becomes_zeros(format: ModuleType, value: float) -> None:
    """Also where the reciprocal of a scale would be infinite: next to a zero it would make NaN."""
    q = format.quantize(torch.tensor([[value, 0.0], [1.0, 0.5]]))
    assert q.scales[0] == 1.0
    assert q.dequantize()[0].tolist() == [0.0, 0.0]
    assert q.dequantize()[1].tolist() == pytest.approx([1.0, 0.5], rel=0.01)


def test_int8_ties_go_to_even() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert int8.quantize(row).codes.tolist() == [[127, 0, 2, 2, 0, -2]]


def test_fp8_keeps_a_row_that_it_can_hold() -> None:
    row = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().unsqueeze(0)
    assert torch.equal(fp8.quantize(row).dequantize(), row)
    assert not torch.equal(fp8.quantize(row + 0.3).dequantize(), row + 0.3)


@both
def test_matmul_is_the_float64_product_of_what_codes_stand_for(format: ModuleType) -> None:
    x, weight = format.quantize(gaussian(5, 64)), format.quantize(gaussian(7, 64, seed=1))

    def values(q: RowwiseTensor) -> Tensor:
        return q.codes.double() * q.scales.double()

    torch.testing.assert_close(x.matmul(weight), values(x) @ values(weight).T, rtol=0, atol=1e-12)
    assert not torch.allclose(x.matmul(weight), gaussian(5, 64).double() @ gaussian(7, 64, seed=1).double().T)


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_are_refused_with_the_remedy(format: ModuleType, value: float) -> None:
    x = gaussian()
    x[3, 5] = value
    with pytest.raises(InputError, match="1 NaN or Inf values: use an intact checkpoint"):
        format.quantize(x)


@both
@pytest.mark.parametrize("shape", [(16,), (2, 2, 16)])
def test_only_matrices_are_quantized(format: ModuleType, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"matrices \[rows, K\]"):
        format.quantize(torch.ones(shape))
