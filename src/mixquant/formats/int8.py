"""INT8 W8A8: codes -127..127, one scale per output channel and per token, as a readable reference.

CPU instructions (VNNI, AMX) multiply unsigned by signed bytes, so kernels send activations as u8 codes with zero
point 128: the integers, and so the result, are the same. Sums of products are exact in INT32 up to K = 133,144.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.formats.checks import check_finite, check_matrix
from mixquant.formats.rowwise import RowwiseTensor, quantize_rows

CODE_MAX = 127
ZERO_POINT = 128


def round_codes(values: Tensor) -> Tensor:
    """Scaled float32 values within +-CODE_MAX to codes; nearest, ties to even."""
    return torch.round(values).to(torch.int8)


def quantize(x: Tensor) -> RowwiseTensor:
    """Weights [N, K] or activations [M, K], finite, to int8 codes."""
    check_matrix(x, 1, "INT8")
    check_finite(x, "INT8 tensor")
    return quantize_rows(x, CODE_MAX, round_codes)
