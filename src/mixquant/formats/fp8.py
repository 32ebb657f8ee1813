"""FP8 W8A8: E4M3 codes, one scale per output channel and per token, as a readable reference.

The row's largest magnitude sits at 448, the layout that `torch._scaled_mm` calls row-wise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.formats.checks import check_finite, check_matrix
from mixquant.formats.rowwise import RowwiseTensor, dequantize, matmul, row_scales

__all__ = ["CODE_MAX", "dequantize", "matmul", "quantize"]

CODE_MAX = 448.0


def quantize(x: Tensor) -> RowwiseTensor:
    """Weights [N, K] or activations [M, K], finite, to E4M3 codes; nearest, ties to even."""
    check_matrix(x, 1, "FP8")
    check_finite(x, "FP8 input")
    x = x.to(torch.float32)
    scales = row_scales(x, CODE_MAX)
    codes = (x * (1.0 / scales)).clamp(-CODE_MAX, CODE_MAX).to(torch.float8_e4m3fn)
    return RowwiseTensor(codes, scales)
