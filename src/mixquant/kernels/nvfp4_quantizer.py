"""NVFP4 activations for tensor cores in one pass: block scales, codes, packing and swizzling, by one Triton kernel.

What. `quantize(x, global_scale)` is `formats.nvfp4.quantize_activation`, bit for bit, with its scales already in the
128x4 tiles that tensor cores read. Each value is read once; each code and scale is written once. `fake_quantize` is the
same for emulation: the values that those codes stand for.
How. A program takes a row of up to `WIDTH` columns. Blackwell rounds to E2M1 by an instruction of its own; elsewhere
(Hopper, and Triton's interpreter on a CPU) `_e2m1_code` does the same by plain arithmetic. The choice is `HARDWARE`.
State. The arithmetic branch equals the reference in the interpreter. Of the instruction, tests see that ptxas takes it
for every Blackwell architecture; what it computes is compared once on the device itself. `proof` says what has run.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives its functions types of its own, by what they are called with.

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024
"""Columns of a program; a multiple of 64, the columns of a tile of scales."""


@triton.jit
def _to_grid(x, smallest: tl.constexpr, magic: tl.constexpr):
    """Float32 magnitudes rounded to nearest, ties to even. Adding and subtracting 1.5 * 2^23 times the distance of two
    values of the grid rounds to it, as in `formats.nvfp4.round_e2m1`: `magic` times the power of two below x, which is
    not under `smallest`."""
    power = tl.maximum((x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True), smallest)
    return (x + power * magic) - power * magic


@triton.jit
def _e4m3(x):
    """Magnitudes up to 448 on E4M3's grid: three bits below the first, and 2^-9 apart at least."""
    return _to_grid(x, 0.015625, 1572864.0)


@triton.jit
def _e4m3_code(value):
    """The byte of a value of E4M3's grid. Under 2^-6 it counts steps of 2^-9; above, exponents are 120 smaller."""
    normal = (value.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    return tl.where(value < 0.015625, (value * 512.0).to(tl.int32), normal).to(tl.uint8)


@triton.jit
def _e2m1_code(x):
    """E2M1 codes of magnitudes up to 6."""
    value = _to_grid(x, 1.0, 6291456.0)
    return tl.where(value < 2.0, value * 2.0, tl.where(value < 4.0, value + 2.0, value * 0.5 + 4.0)).to(tl.int32)


@triton.jit
def _pack(low, high, HARDWARE: tl.constexpr):
    """Scaled float32 values to a byte of two codes each, `low` in the lower half."""
    if HARDWARE:
        # Adding zero makes -0.0 a plain zero, as the reference has it; what rounds to zero keeps its sign.
        return tl.inline_asm_elementwise(
            "{ .reg .b8 pair; cvt.rn.satfinite.e2m1x2.f32 pair, $2, $1; cvt.u32.u8 $0, pair; }",
            "=r,f,f",
            [low + 0.0, high + 0.0],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        ).to(tl.uint8)
    signs = (low < 0).to(tl.int32) << 3 | (high < 0).to(tl.int32) << 7
    magnitudes = _e2m1_code(tl.minimum(tl.abs(low), 6.0)) | _e2m1_code(tl.minimum(tl.abs(high), 6.0)) << 4
    return (signs | magnitudes).to(tl.uint8)


@triton.jit
def _block_scales(blocks, global_scale):
    """Of float32 blocks [n, 16] their E4M3 scales [n], and what takes values to E2M1's grid.

    The reference's own order of multiplications, and divisions rounded to nearest: the same bits.
    """
    largest = tl.max(tl.abs(blocks), 1)
    scale = _e4m3(tl.minimum(global_scale * (largest * 0.16666667163372039795), 448.0))
    decode = scale * tl.math.div_rn(1.0, global_scale)
    return scale, tl.where(decode == 0, 1e-8, tl.math.div_rn(1.0, tl.where(decode == 0, 1.0, decode)))


@triton.jit
def store_blocks(
    values, row, first, codes, scales, global_scale, rows, columns, tiles, WIDTH: tl.constexpr, HARDWARE: tl.constexpr
):
    """Quantize float32 `values`, the columns from `first` of a row, which are zero beyond the matrix.

    codes [rows, columns / 2]; scales: whole tiles, `tiles` side by side.
    """
    blocks = tl.reshape(values, (WIDTH // 16, 16))
    scale, encode = _block_scales(blocks, global_scale)
    low, high = tl.split(tl.reshape(blocks * encode[:, None], (WIDTH // 2, 2)))

    pair = first // 2 + tl.arange(0, WIDTH // 2)
    packed = _pack(low, high, HARDWARE)
    tl.store(codes + row * (columns // 2) + pair, packed, mask=(pair < columns // 2) & (row < rows))

    block = first // 16 + tl.arange(0, WIDTH // 16)
    tile = (row // 128) * tiles + block // 4
    place = tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + block % 4
    tl.store(scales + place, _e4m3_code(scale), mask=block < tiles * 4)


@triton.jit
def _quantize(
    x, codes, scales, global_scale, rows, columns, tiles, stride, WIDTH: tl.constexpr, HARDWARE: tl.constexpr
):
    """x [rows, columns], rows `stride` apart; the rest as `store_blocks` has it."""
    row = tl.program_id(0).to(tl.int64)  # up to a multiple of 128: rows beyond the last have zero scales
    first = tl.program_id(1) * WIDTH
    column = first + tl.arange(0, WIDTH)
    values = tl.load(x + row * stride + column, mask=(column < columns) & (row < rows), other=0.0).to(tl.float32)
    store_blocks(values, row, first, codes, scales, global_scale, rows, columns, tiles, WIDTH, HARDWARE)


def quantize(x: Tensor, global_scale: float, hardware: bool) -> tuple[Tensor, Tensor]:
    """Activations [rows, K], K a multiple of 16, as uint8 [rows, K/2] and float8_e4m3fn, flat: whole 128x4 tiles.

    hardware: round to E2M1 by Blackwell's instruction; see `rounds_in_hardware`.
    """
    rows, columns = x.shape
    x = by_rows(x)
    codes, scales, padded, tiles = empty(x)
    grid = (padded, -(-columns // WIDTH))
    with torch.cuda.device_of(x):  # the current device may be another
        _quantize[grid](x, codes, scales, global_scale, rows, columns, tiles, x.stride(0), WIDTH, hardware)
    return codes, scales.view(torch.float8_e4m3fn)


@triton.jit
def _fake_quantize(x, out, global_scale, step, count, WIDTH: tl.constexpr):
    """x, out [count], of whole blocks: code * block scale * step. What is no number stays so, as in the reference."""
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    blocks = tl.reshape(tl.load(x + place, mask=place < count, other=0.0).to(tl.float32), (WIDTH // 16, 16))
    scale, encode = _block_scales(blocks, global_scale)
    scaled = tl.minimum(tl.maximum(blocks * encode[:, None], -6.0), 6.0)
    values = _to_grid(scaled, 1.0, 6291456.0) * (scale * step)[:, None]
    values = tl.where(blocks == blocks, values, blocks)
    tl.store(out + place, tl.reshape(values, (WIDTH,)).to(out.dtype.element_ty), mask=place < count)


def fake_quantize(x: Tensor, global_scale: float, step: float) -> Tensor:
    """Activations [rows, K] on NVFP4's grid, in their own dtype: code * block scale * step, in one pass."""
    x = x.contiguous()
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # the current device may be another
        _fake_quantize[(-(-x.numel() // WIDTH),)](x, out, global_scale, step, x.numel(), WIDTH)
    return out


def by_rows(x: Tensor) -> Tensor:
    """x with its columns side by side, as kernels read it; its rows may be apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def empty(x: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Codes and scales of activations like x, to be written; rows with their padding; tiles of scales side by side."""
    rows, columns = x.shape
    padded, tiles = -(-rows // 128) * 128, -(-columns // 64)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=x.device)
    return codes, torch.empty(padded * tiles * 4, dtype=torch.uint8, device=x.device), padded, tiles


@functools.cache
def rounds_in_hardware(device: torch.device) -> bool:
    """Whether a device has the instruction and it rounds as the reference does, tried once on every kind of value.

    Where it should differ, plain arithmetic takes its place, with a warning.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0):
        return False
    ties = [0.0, -0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.26, 0.74, -0.24, -0.1, 2.51, 4.99]
    block = torch.tensor(ties, device=device)  # its scale is 1, so that ties are ties
    values = torch.stack([block, -block]).repeat(8, 64)
    one, other = (quantize(values, 1.0, hardware) for hardware in (True, False))
    equal = all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    if not equal:
        warnings.warn("This GPU rounds to E2M1 in another way than the format: report it to mixquant.", stacklevel=2)
    return equal
