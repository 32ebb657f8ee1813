"""NVFP4 activations straight out of what comes before a linear layer: RMSNorm, and SiLU times a gated branch.

What. `quantize_rms_norm(x, weight, ...)` is `nvfp4_quantizer.quantize` of Transformers' RMSNorm, and
`quantize_silu_mul(gate, up, ...)` that of its SwiGLU. What is quantized never goes through memory: of BF16 activations
that saves a write of 16 bits a value and a read of 16, beside 4.5 bits that are written either way.
How. A program takes a row (norm) or up to `WIDTH` columns of one (SiLU), computes in float32, and rounds to BF16 where
Transformers and vLLM do, so that the codes are those of the chain. `_bf16` does it by integer arithmetic: Triton's
interpreter, which shows all this on a CPU, cuts where a GPU rounds. Scales, codes and tiles are `store_blocks`.
Trade-off. Bits are the chain's as far as sums and functions are: a GPU adds squares in an order of its own, and its
`exp` and `rsqrt` may differ from torch's in the last bit, which moves a value of BF16 now and then.
Callers. `model.deferred`, for prompt rows of a Transformers model.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Triton gives its functions types of its own, by what they are called with.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixquant.kernels.nvfp4_quantizer import WIDTH, by_rows, empty, store_blocks


@triton.jit
def _bf16(x):
    """Float32 values on BF16's grid, nearest, ties to even: half a unit below the lowest bit kept, one if that is odd,
    carries into it where it should."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _row(x, row, first, rows, columns, stride, WIDTH: tl.constexpr):
    column = first + tl.arange(0, WIDTH)
    inside = (column < columns) & (row < rows)
    return tl.load(x + row * stride + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rms_norm(
    x, weight, codes, scales, global_scale, epsilon, rows, columns, tiles, stride,
    WIDTH: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """x [rows, columns], rows `stride` apart; weight [columns]. The second walk along a row finds it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, columns, WIDTH):
        values = _row(x, row, first, rows, columns, stride, WIDTH)
        squares += values * values
    factor = tl.rsqrt(tl.math.div_rn(tl.sum(squares, 0), columns.to(tl.float32)) + epsilon)
    for first in range(0, columns, WIDTH):
        values = _row(x, row, first, rows, columns, stride, WIDTH)
        by = _row(weight, 0, first, 1, columns, 0, WIDTH)
        normed = _bf16(by * _bf16(values * factor))
        store_blocks(normed, row, first, codes, scales, global_scale, rows, columns, tiles, WIDTH, HARDWARE)


@triton.jit
def _silu_mul(
    gate, up, codes, scales, global_scale, rows, columns, tiles, gate_stride, up_stride,
    WIDTH: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """gate and up [rows, columns], rows a stride apart: two matrices, or the halves of one."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * WIDTH
    gates = _row(gate, row, first, rows, columns, gate_stride, WIDTH)
    ups = _row(up, row, first, rows, columns, up_stride, WIDTH)
    silu = _bf16(tl.math.div_rn(gates, 1.0 + tl.exp(-gates)))
    store_blocks(_bf16(silu * ups), row, first, codes, scales, global_scale, rows, columns, tiles, WIDTH, HARDWARE)


def quantize_rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, global_scale: float, hardware: bool
) -> tuple[Tensor, Tensor]:
    """BF16 x [rows, K], each row divided by its root mean square, times `weight` [K]: quantized as by `quantize`."""
    rows, columns = x.shape
    x = by_rows(x)
    codes, scales, padded, tiles = empty(x)
    with torch.cuda.device_of(x):  # the current device may be another
        _rms_norm[(padded,)](
            x, weight, codes, scales, global_scale, epsilon, rows, columns, tiles, x.stride(0), WIDTH, hardware
        )
    return codes, scales.view(torch.float8_e4m3fn)


def quantize_silu_mul(gate: Tensor, up: Tensor, global_scale: float, hardware: bool) -> tuple[Tensor, Tensor]:
    """silu(gate) * up of BF16 [rows, K]: quantized as by `quantize`."""
    rows, columns = gate.shape
    gate, up = by_rows(gate), by_rows(up)
    codes, scales, padded, tiles = empty(gate)
    with torch.cuda.device_of(gate):  # the current device may be another
        _silu_mul[padded, -(-columns // WIDTH)](
            gate, up, codes, scales, global_scale, rows, columns, tiles, gate.stride(0), up.stride(0), WIDTH, hardware
        )
    return codes, scales.view(torch.float8_e4m3fn)
