"""FP8 W8A8: E4M3 codes, one scale per output channel and per token, as a readable reference.

The row's largest magnitude sits at 448, the layout that `torch._scaled_mm` calls row-wise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.formats.checks import check_finite, check_matrix
from mixquant.formats.rowwise import RowwiseTensor, quantize_rows

CODE_MAX = 448.0


def round_codes(values: Tensor) -> Tensor:
    """Scaled float32 values within +-CODE_MAX to codes; nearest, ties to even."""
    return values.to(torch.float8_e4m3fn)


def quantize(x: Tensor) -> RowwiseTensor:
    """Weights [N, K] or activations [M, K], finite, to E4M3 codes."""
    check_matrix(x, 1, "FP8")
    check_finite(x, "FP8 tensor")
    return quantize_rows(x, CODE_MAX, round_codes)
