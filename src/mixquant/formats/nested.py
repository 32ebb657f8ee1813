"""Nested weights: one copy, two precisions. An FP8 weight and four bits more are the BF16 weight again, bit for bit.

What. A BF16 value is a sign, eight bits of exponent and seven of mantissa. In one row (output channel) of a weight
nearly all exponents lie within 15 binades of the largest, so four bits of exponent do. Counted from the row's `offset`,
a magnitude is then an 11-bit integer, whose upper 7 bits, rounded, are an E4M3 code:

    magnitude = exponent << 7 | mantissa       15 bits, monotonic in |w|
    relative  = magnitude - (offset << 7)      0 .. 2023; below the smallest normal a fixed point, as in E4M3
    code      = (relative + 8) >> 4            7 bits, to nearest; with the sign: float8_e4m3fn, scale 2^(offset - 120)
    nibble    = (relative + 8) & 15            the 4 bits below
    back:       relative = (code << 4 | nibble) - 8

The codes of all weights are the *plane*, an ordinary FP8 weight that prefill multiplies by as it is. Plane and nibbles
together are the BF16 weight: 12 bits a weight, where two copies take 24. `offset` is the smallest that keeps the row's
largest code at 0x7E (448) or below, since 0x7F is NaN.
Escapes. The fixed point drops bits of weights below about 2^-14 of their row's largest. What it drops, at most 2^-22 of
the row's largest, is kept as a sparse matrix: 1.5e-4 of Gaussian weights need it, 1e-3 with heavy tails.
Trade-off. The scale is a power of two, where ordinary FP8 puts the row's largest at 448 exactly. So the plane reaches
lower and wastes part of its last binade: squared error 1.00 to 1.04 times as large on Gaussian weights, 1.1 with heavy
tails.
Sources. NestedFP (arXiv:2506.02024) nests FP8 in FP16, 16 bits a weight; for BF16 we know of no prior art.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats.checks import check_finite, check_matrix, row_slices
from mixquant.formats.rowwise import RowwiseTensor

LARGEST = 0x7E << 4 | 7
"""The largest relative magnitude whose code is a number: 0x7E, rounded to from above."""

SMALLEST_NORMAL = 1 << 7
"""Relative magnitudes below it are a fixed point in steps of 2^(offset - 133), as BF16's subnormals are."""

TILE = 16
"""Rows that a matrix instruction takes at once, and so what escapes are counted in."""

MOST_ESCAPES = 2.0**-7
"""The largest share of a tile's weights that may be escapes. A kernel adds a tile's escapes one by one after a product
that reads 12 bits a weight: with more than this, of 64 bits each, nesting saves less than a fifth, and one tile delays
its whole layer."""


@dataclass(frozen=True)
class Escapes:
    """What the fixed point drops, as a sparse matrix [N, K] in rows of compressed storage (CSR).

    starts: int32 [N + 1], where each row begins in the others. columns: int32 [E]. differences: bfloat16 [E], exact.
    """

    starts: Tensor
    columns: Tensor
    differences: Tensor

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + self.columns.nbytes + self.differences.nbytes

    def rows(self) -> Tensor:
        """The row of each escape: int64 [E]."""
        counts = self.starts.diff().to(torch.int64)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)

    def by_tile(self) -> Tensor:
        """How many there are in each `TILE` rows, which divide N: int32 [N / TILE]."""
        return self.starts[::TILE].diff()


@dataclass(frozen=True)
class NestedTensor:
    """A BF16 weight [N, K] in two planes.

    plane: float8_e4m3fn [N, K]. nibbles: uint8 [N, K/2], the even column in the low half. scales: float32 [N, 1],
    powers of two from 2^-120 to 2^120.
    """

    plane: Tensor
    nibbles: Tensor
    scales: Tensor
    escapes: Escapes

    @property
    def shape(self) -> tuple[int, int]:
        return self.plane.shape[0], self.plane.shape[1]

    @property
    def nbytes(self) -> int:
        return self.plane.nbytes + self.nibbles.nbytes + self.scales.nbytes + self.escapes.nbytes

    @property
    def fp8(self) -> RowwiseTensor:
        """The plane as the FP8 weight that it is, sharing its memory."""
        return RowwiseTensor(self.plane, self.scales)

    def join(self) -> Tensor:
        """The weight again, bit for bit: bfloat16 [N, K]."""
        joined = torch.empty(self.shape, dtype=torch.bfloat16, device=self.plane.device)
        for rows in _slices(self.plane):
            joined[rows] = _join(self.plane[rows], self.nibbles[rows], self.scales[rows])
        joined[self.escapes.rows(), self.escapes.columns] = self.escaped()
        return joined

    def escaped(self) -> Tensor:
        """The weights that are escapes: bfloat16 [E]."""
        rows, columns = self.escapes.rows(), self.escapes.columns
        nibbles = self.nibbles[rows, columns // 2] >> (columns % 2 * 4).to(torch.uint8) & 15
        plain = _values(self.plane.view(torch.uint8)[rows, columns], nibbles, self.scales[rows, 0])
        return plain + self.escapes.differences  # exact: the sum is the weight


def split(weight: Tensor) -> NestedTensor:
    """A weight, bfloat16 [N, K] with even K and finite, as an FP8 plane and the rest.

    Raises InputError for other dtypes: FP16 has three bits of mantissa more, which 12 bits cannot hold. Whether the
    escapes are few enough to multiply by, `too_many_escapes` says.
    """
    offset = offsets(weight)
    scales = scales_of(offset)
    n, k = weight.shape
    plane = torch.empty(n, k, dtype=torch.float8_e4m3fn, device=weight.device)
    nibbles = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    found = []
    for rows in _slices(weight):
        plane[rows], nibbles[rows], *escapes = _split(weight[rows], offset[rows], scales[rows])
        found.append(escapes)
    counts, columns, differences = (torch.cat(column) for column in zip(*found, strict=True))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return NestedTensor(plane, nibbles, scales, Escapes(starts, columns, differences))


def offsets(weight: Tensor) -> Tensor:
    """The offset of each row of a weight: int32 [N, 1]. Raises InputError for what does not nest, NaN and Inf too.

    It takes no temporary of the weight's size. NaN is both least and greatest of its row.
    """
    check_matrix(weight, 2, "A nested weight")
    if weight.dtype is not torch.bfloat16:
        raise InputError(f"Only bfloat16 weights nest, not {weight.dtype}: use storage=separate.")
    largest = torch.maximum(weight.amin(-1, keepdim=True).abs(), weight.amax(-1, keepdim=True).abs())
    if not largest.isfinite().all():
        check_finite(weight, "A nested weight")  # says how many
    magnitude = largest.view(torch.int16).to(torch.int32)
    return (magnitude - LARGEST).clamp(min=0).add(127) >> 7  # rounded up


def scales_of(offset: Tensor) -> Tensor:
    """What the plane's codes are multiplied by in rows of these offsets: float32."""
    return _power_of_two(offset - 120).to(torch.float32)


def too_many_escapes(by_tile: Tensor, k: int) -> str | None:
    """Why a weight of K columns may not be nested: a tile of it has more than `MOST_ESCAPES`. Else None.

    by_tile: how many escapes each `TILE` rows have, [N / TILE].
    """
    most = int(by_tile.max())
    if most <= MOST_ESCAPES * TILE * k:
        return None
    return (
        f"{most} of {TILE * k} weights in {TILE} rows are too small beside the largest of their row to nest (at most "
        f"{int(MOST_ESCAPES * TILE * k)} may be, {int(by_tile.sum())} are in all {len(by_tile) * TILE} rows)"
    )


def _slices(x: Tensor) -> list[slice]:
    """256K weights at once, each of which takes 54 bytes while it is worked on."""
    rows, columns = x.shape
    return row_slices(rows, columns * 4)


def _split(weight: Tensor, offset: Tensor, scales: Tensor) -> tuple[Tensor, ...]:
    """Some rows: plane and nibbles; and of the escapes how many a row has, their columns and differences."""
    bits = weight.contiguous().view(torch.int16).to(torch.int32)
    rounded = _relative(weight, bits & 0x7FFF, offset) + 8
    plane = ((bits < 0).to(torch.int32) << 7 | rounded >> 4).to(torch.uint8).view(torch.float8_e4m3fn)
    nibble = rounded & 15
    nibbles = (nibble[:, ::2] | nibble[:, 1::2] << 4).to(torch.uint8)
    difference = (weight.to(torch.float32) - _join(plane, nibbles, scales).to(torch.float32)).to(torch.bfloat16)
    escaped = difference != 0
    rows, columns = escaped.nonzero(as_tuple=True)
    counts = escaped.sum(-1)
    return plane, nibbles, counts, columns.to(torch.int32), difference[rows, columns]


def _relative(weight: Tensor, magnitude: Tensor, offset: Tensor) -> Tensor:
    """Magnitudes counted from the offset of their row: int32 [rows, K], the fixed point rounded to nearest."""
    fixed = (weight.abs().to(torch.float64) * _power_of_two(133 - offset)).round().to(torch.int32)
    relative = magnitude - (offset << 7)
    return torch.where(relative < SMALLEST_NORMAL, fixed, relative)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, made of its bits: `pow` need not be exact on every device."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _join(plane: Tensor, nibbles: Tensor, scales: Tensor) -> Tensor:
    """Some rows without their escapes: bfloat16 [rows, K]."""
    return _values(plane.view(torch.uint8), torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(-2), scales)


def _values(codes: Tensor, nibbles: Tensor, scales: Tensor) -> Tensor:
    """Weights that are no escapes, of codes and nibbles of one shape, uint8, and scales: bfloat16."""
    relative = ((codes & 0x7F).to(torch.int16) << 4 | nibbles) - 8
    # As a BF16 bit pattern, `relative` is the value under offset 0, subnormals too: the offset is one more scale.
    values = relative.view(torch.bfloat16).to(torch.float64) * (scales.to(torch.float64) * 2.0**120)
    return torch.where(codes > 0x7F, -values, values).to(torch.bfloat16)
