"""NVFP4 W4A4 by one Triton kernel, `tl.dot_scaled`: for Blackwell where torch's own product does not run.

What. y = alpha * (codes * block scales) @ (codes * block scales).T + bias; sums in float32, one rounding at the end.
Operands are those of torch's scaled product, so that both kernels share one quantizer and one layout of the weight.
How. A program owns 128 x 128 results and walks along K, 256 columns a step. Triton turns each step into the GPU's
block-scaled matrix instructions: `tcgen05.mma` (10.0, 10.3; sums in tensor memory) or `mma.sync` (12.x; in registers),
both of kind `mxf4nvf4` with one scale of E4M3 for each 16 codes.
Layout. Block scales come in tiles of 128 rows by 4 blocks, 512 bytes each, of which byte
(row % 32) * 16 + (row // 32) * 4 + block belongs to (row, block): scales of four rows, 32 apart, stand side by side.
Seen as [32, 4, 4], a tile only has to swap its first two axes to be [128, 4] again (`_scales`).
Trade-off. Plain loads and no tuning: one shape of tile for every product. It is here to be right and to be second.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives its functions types of its own, by what they are called with.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = COLUMNS = 128
"""Results of a program: whole tiles of scales, which are padded, so that their loads need no mask along the rows."""

DEPTH = 256
"""Columns of K of a step: the codes of both sides are 128 bytes a row, one line of the cache."""

OPTIONS = {"num_warps": 8, "num_stages": 3}
"""Two steps' operands in shared memory (72 KiB, of the 99 that RTX 50 has) while a third is multiplied."""


@triton.jit
def _codes(operand, row, rows, step, columns, DEPTH: tl.constexpr):
    """Bytes of two codes, [rows of the program, DEPTH / 2]; beyond the matrix zero, which is twice the code of 0."""
    pair = step * (DEPTH // 2) + tl.arange(0, DEPTH // 2)
    inside = (row[:, None] < rows) & (pair[None, :] < columns // 2)
    return tl.load(operand + row[:, None] * (columns // 2) + pair[None, :], mask=inside, other=0)


@triton.jit
def _scales(scales, band, step, tiles, DEPTH: tl.constexpr):
    """Block scales [128, DEPTH / 16] of a band of 128 rows, out of tiles that stand `tiles` side by side."""
    tile = step * (DEPTH // 64) + tl.arange(0, DEPTH // 64)
    place = (band * tiles + tile[:, None]) * 512 + tl.arange(0, 512)[None, :]
    found = tl.load(scales + place, mask=tile[:, None] < tiles, other=0.0)
    found = tl.reshape(found, (DEPTH // 64, 32, 4, 4))  # tile, row % 32, row // 32, block % 4
    return tl.reshape(tl.permute(found, (2, 1, 0, 3)), (128, DEPTH // 16))


@triton.jit
def _product(
    x, x_scales, x_decode, weight, weight_scales, weight_decode, bias, out, m, n, k, tiles,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x [m, k / 2] and weight [n, k / 2], two codes a byte; out [m, n]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(k, DEPTH)):
        total = tl.dot_scaled(
            _codes(x, row, m, step, k, DEPTH),
            _scales(x_scales, tl.program_id(0).to(tl.int64), step, tiles, DEPTH),
            "e2m1",
            _codes(weight, column, n, step, k, DEPTH).T,
            _scales(weight_scales, tl.program_id(1).to(tl.int64), step, tiles, DEPTH),
            "e2m1",
            total,
        )
    y = total * (tl.load(x_decode) * tl.load(weight_decode))
    if BIAS:
        y += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    inside = (row[:, None] < m) & (column[None, :] < n)
    tl.store(out + row[:, None] * n + column[None, :], y.to(out.dtype.element_ty), mask=inside)


def product(
    codes: Tensor,
    scales: Tensor,
    decode: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    weight_decode: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x @ weight.T + bias [M, N] of NVFP4 operands.

    codes, weight: uint8 [M, K/2] and [N, K/2]. scales, weight_scales: float8_e4m3fn, flat, in whole tiles. decode,
    weight_decode: float32 [1], what takes a global scale out again.
    """
    m, n, k = codes.shape[0], weight.shape[0], codes.shape[1] * 2
    out = torch.empty(m, n, dtype=dtype, device=codes.device)
    grid = (-(-m // ROWS), -(-n // COLUMNS))
    with torch.cuda.device_of(codes):  # the current device may be another
        _product[grid](
            codes, scales, decode, weight, weight_scales, weight_decode, out if bias is None else bias, out,
            m, n, k, -(-k // 64), bias is not None, ROWS, COLUMNS, DEPTH, **OPTIONS,
        )  # fmt: skip
    return out
