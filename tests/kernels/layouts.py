"""What NVFP4 operands stand for, by nothing but their documented layout: another way than the code that makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.formats import nvfp4


def unswizzled(flat: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, cols] out of the tiled order of cuBLAS and CUTLASS, by its formula."""
    r, c = torch.arange(rows)[:, None], torch.arange(cols)
    tile = (r // 128) * -(-cols // 4) + c // 4
    place = tile * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4
    return flat.flatten().view(torch.uint8)[place].view(flat.dtype)


def decoded(packed: Tensor, scales: Tensor) -> Tensor:
    """code * block scale of uint8 [rows, K/2] and scales in tiles, float64 [rows, K]."""
    rows, k = packed.shape[0], packed.shape[1] * 2
    return nvfp4.unpack(packed).double() * unswizzled(scales, rows, k // 16).double().repeat_interleave(16, 1)
