"""Input checks that all formats share: each failure is one sentence that names its remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.errors import InputError


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
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise InputError(f"{what} holds {bad} NaN or Inf values: use an intact checkpoint or input.")
