"""What all formats share: input checks whose failure is one sentence with its remedy, and work in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.errors import InputError

_ELEMENTS = 1 << 20


def check_matrix(x: Tensor, multiple: int, format: str) -> None:
    """Raise InputError unless x is [rows, K] with K a positive multiple of `multiple`."""
    if x.ndim != 2:
        raise InputError(f"{format} quantizes matrices [rows, K], not a tensor of shape {tuple(x.shape)}.")
    if x.shape[1] == 0 or x.shape[1] % multiple:
        raise InputError(
            f"{format} needs K to be a multiple of {multiple}, not {x.shape[1]}: add the layer to `ignore`."
        )


def check_finite(x: Tensor, what: str) -> None:
    """Raise InputError if x holds NaN or Inf: quantizing it would spread to the whole block."""
    if torch.stack(x.aminmax()).isfinite().all():  # without a temporary as large as x; NaN is both least and greatest
        return
    bad = sum(int((~torch.isfinite(chunk.to(torch.float32))).sum()) for chunk in row_chunks(x))
    if bad:
        raise InputError(f"{what} holds {bad} NaN or Inf values: use an intact checkpoint or input.")


def row_slices(rows: int, columns: int) -> list[slice]:
    """Slices of a few rows each: quantizing them in turn bounds the float32 temporaries to a few times 4 MiB."""
    step = max(1, _ELEMENTS // max(columns, 1))
    return [slice(start, start + step) for start in range(0, max(rows, 1), step)]


def row_chunks(x: Tensor) -> list[Tensor]:
    """Views of a matrix by `row_slices`."""
    return [x[rows] for rows in row_slices(*x.shape)]
