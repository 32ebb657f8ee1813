"""Work in chunks of rows: the same bits as in one piece, and the same errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mixquant.errors import InputError
from mixquant.formats import checks, fp8, int8, nvfp4, scales
from mixquant.kernels.emulation import EmulatedNVFP4
from tests.formats.inputs import ROWS, K, gaussian, same_bits

QUANTIZERS: dict[str, Callable[[torch.Tensor], object]] = {
    "nvfp4": nvfp4.quantize_weight,
    "nvfp4 searched": lambda x: nvfp4.quantize_weight(x, scales.search),
    "nvfp4 activations": nvfp4.quantize_activation,
    "nvfp4 emulated": lambda x: EmulatedNVFP4.from_weight(x, nvfp4.quantize_weight),
    "fp8": fp8.quantize,
    "int8": int8.quantize,
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows a chunk."""
    monkeypatch.setattr(checks, "_ELEMENTS", 3 * K)


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
def test_chunks_change_no_bit(quantize: Callable[[torch.Tensor], object], request: pytest.FixtureRequest) -> None:
    whole = vars(quantize(gaussian()))
    request.getfixturevalue("small_chunks")
    chunked = vars(quantize(gaussian()))
    tensors = {name for name, value in whole.items() if isinstance(value, torch.Tensor)}
    assert tensors
    assert all(same_bits(whole[name], chunked[name]) for name in tensors)


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.usefixtures("small_chunks")
def test_nan_and_inf_are_counted_over_all_chunks(quantize: Callable[[torch.Tensor], object]) -> None:
    x = gaussian()
    x[0, 0], x[-1, -1] = torch.nan, torch.inf
    with pytest.raises(InputError, match="2 NaN or Inf values"):
        quantize(x)


@pytest.mark.parametrize(
    ("rows", "columns", "chunks"), [(ROWS, K, 11), (3, K, 1), (1, 4 * K, 1), (5, 4 * K, 5), (0, K, 1)]
)
@pytest.mark.usefixtures("small_chunks")
def test_slices_cover_every_row_once(rows: int, columns: int, chunks: int) -> None:
    slices = checks.row_slices(rows, columns)
    assert [row for part in slices for row in range(rows)[part]] == list(range(rows))
    assert len(slices) == chunks
