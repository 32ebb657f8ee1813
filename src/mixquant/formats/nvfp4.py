"""NVFP4: 4-bit floats with two levels of scales, as a readable reference.

    value = e2m1 code * E4M3 block scale / global scale

What. E2M1 holds 0, .5, 1, 1.5, 2, 3, 4, 6 and a sign; every block of 16 values along K shares one E4M3
scale; one FP32 *global scale* g (a multiplier, 448*6/amax) spreads the tensor over E4M3's range.
How. vLLM's flavour, bit for bit (`ref_nvfp4_quant`, vLLM 0.32): FP32 arithmetic, reciprocals instead of
divisions, round to nearest with ties to even, saturation at 6 and 448, a zero scale gives zero codes. What is
negative and rounds to zero becomes minus zero, code 0x8; -0.0 itself becomes 0x0.
Layout. Two codes a byte, low nibble = even k; block scales [rows, K/16] row-major on disk and here,
swizzled into 128x4 tiles for tensor cores (`swizzle`).
Trade-off. Our own global scales are powers of two: `code * scale / g` is then exact in BF16, so a BF16
matrix product of dequantized operands equals the tensor-core instruction up to summation order. The price
is 0.2 % more squared error. Globals found in other tools' checkpoints stay as they are, in the epilogue.
Static activation scale. A dynamic one would make a token's result depend on its batch mates. Calibration
sets it per layer; without data it is `ACTIVATION_GLOBAL_SCALE`, and `activation_range` counts what it misses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixquant.formats.checks import check_finite, check_matrix, row_chunks

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_TINY = 2.0**-9  # smallest positive (subnormal) E4M3 value
CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

ACTIVATION_GLOBAL_SCALE = 4.0
"""Multiplier for activations without calibration. Covers block maxima from 0.0029 to 672."""


@dataclass(frozen=True)
class NVFP4Tensor:
    """A quantized matrix [rows, K].

    packed: uint8 [rows, K/2], low nibble = even k.
    scales: float8_e4m3fn [rows, K/16], row-major.
    global_scale: float32 [], a multiplier: dequantize divides by it.
    """

    packed: Tensor
    scales: Tensor
    global_scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.packed.shape[1] * 2

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.global_scale.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """A layer's tensors under compressed-tensors' names. The global scale is a copy: a fused group shares it."""
        scales = {"weight_scale": self.scales, "weight_global_scale": self.global_scale.reshape(1).clone()}
        return {"weight_packed": self.packed} | scales

    def rows(self, rows: slice) -> NVFP4Tensor:
        """Some of the rows, as views."""
        return NVFP4Tensor(self.packed[rows], self.scales[rows], self.global_scale)

    def dequantize(self) -> Tensor:
        """float32 [rows, K]: code * scale / g."""
        return self.codes_times_scales() * (1.0 / self.global_scale)

    def codes_times_scales(self) -> Tensor:
        """code * block scale without the global, float32 [rows, K]; every such product is exact in BF16."""
        return (blocks(unpack(self.packed)) * self.scales.to(torch.float32).unsqueeze(-1)).flatten(-2)

    def matmul(self, weight: NVFP4Tensor) -> Tensor:
        """self @ weight.T in float64 from exact products: [M, K], [N, K] -> float64 [M, N]. The truth for kernels."""
        products = self.codes_times_scales().double() @ weight.codes_times_scales().double().T
        return products / (self.global_scale.double() * weight.global_scale.double())


def blocks(x: Tensor) -> Tensor:
    """View of [..., K] as [..., K/16, 16]."""
    return x.reshape(*x.shape[:-1], -1, BLOCK)


def weight_global_scale(amax: Tensor) -> Tensor:
    """The largest power of two g with amax * g <= 448 * 6; float32 []. An all-zero tensor gets 1."""
    if not amax > 0:
        return torch.ones((), dtype=torch.float32, device=amax.device)
    exponent = math.floor(math.log2(E4M3_MAX * E2M1_MAX / float(amax)))
    largest = 117  # keeps 2^-9 / g, the smallest step, and its reciprocal in FP32's normal range
    return torch.tensor(2.0 ** min(exponent, largest), dtype=torch.float32, device=amax.device)


def block_scales(x: Tensor, global_scale: Tensor) -> Tensor:
    """E4M3 scale of each block: float32 [rows, K] and [] -> float8_e4m3fn [rows, K/16]."""
    amax = blocks(x).abs().amax(-1)
    scale = global_scale * (amax * (1.0 / E2M1_MAX))
    return scale.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


ScaleRule = Callable[[Tensor, Tensor], Tensor]
"""From a float32 matrix [N, K] and its global scale to float8_e4m3fn block scales [N, K/16]."""


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 value, ties to even code, saturating at +-6; float32 in, float32 out.

    Adding and subtracting 1.5 * 2^22 * 2^e rounds to the grid spacing 2^(e-1) of x's binade: the FPU's own
    ties-to-even does the rest.
    """
    x = x.clamp(-E2M1_MAX, E2M1_MAX)
    binade = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(1.0)
    magic = binade * (1.5 * 2.0**22)
    return (x + magic) - magic


def scaled_values(x: Tensor, scales: Tensor, global_scale: Tensor) -> Tensor:
    """x / (scale / g), the E2M1 grid's argument: float32 [rows, K].

    Where the scale is zero, x times a number so small that only the sign is left; vLLM's 1e-8, for the same bits.
    """
    decode = scales.to(torch.float32) * (1.0 / global_scale)
    encode = torch.where(decode == 0, torch.full_like(decode, 1e-8), 1.0 / decode)
    return (blocks(x) * encode.unsqueeze(-1)).flatten(-2)


def pack(values: Tensor) -> Tensor:
    """E2M1 values, float32 [rows, K] -> two codes a byte, uint8 [rows, K/2]. The sign of zero is kept."""
    grid = torch.tensor(CODES, device=values.device)
    codes = torch.searchsorted(grid, values.abs().contiguous()).to(torch.uint8)
    codes |= torch.signbit(values).to(torch.uint8) << 3
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """uint8 [rows, K/2] -> E2M1 values, float32 [rows, K]."""
    grid = torch.tensor(CODES + tuple(-c for c in CODES), device=packed.device)
    codes = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
    return grid[codes.int()]


def encode(x: Tensor, global_scale: Tensor, scales: Tensor) -> NVFP4Tensor:
    """Codes for given scales, unchecked: float32 [rows, K], float32 [], float8_e4m3fn [rows, K/16]."""
    values = scaled_values(x, scales, global_scale)
    return NVFP4Tensor(pack(round_e2m1(values).abs() * values.sign()), scales, global_scale)


def quantize(x: Tensor, global_scale: Tensor, rule: ScaleRule = block_scales) -> NVFP4Tensor:
    """Quantize a matrix [rows, K] with a given global scale.

    Raises InputError where K is not a multiple of 16 or x holds NaN or Inf.
    """
    check_matrix(x, BLOCK, "NVFP4")
    check_finite(x, "NVFP4 input")
    return _quantize_chunks(x, global_scale.to(device=x.device, dtype=torch.float32), rule)


def _quantize_chunks(x: Tensor, global_scale: Tensor, rule: ScaleRule) -> NVFP4Tensor:
    parts = []
    for chunk in row_chunks(x):
        values = chunk.to(torch.float32)
        parts.append(encode(values, global_scale, rule(values, global_scale)))
    return NVFP4Tensor(torch.cat([p.packed for p in parts]), torch.cat([p.scales for p in parts]), global_scale)


def quantize_weight(weight: Tensor, rule: ScaleRule = block_scales, amax: Tensor | None = None) -> NVFP4Tensor:
    """Weight [N, K] with a power-of-two global scale from its largest magnitude, or from a given `amax` (float32 []).

    `rule` chooses block scales (see `mixquant.formats.scales`).
    """
    check_matrix(weight, BLOCK, "NVFP4")
    check_finite(weight, "NVFP4 weight")
    return _quantize_chunks(weight, weight_global_scale(largest_magnitude(weight) if amax is None else amax), rule)


def largest_magnitude(x: Tensor) -> Tensor:
    """float32 [], without a temporary of x's size."""
    lowest, highest = x.aminmax()
    return torch.maximum(-lowest, highest).to(torch.float32)


def quantize_activation(x: Tensor, global_scale: float = ACTIVATION_GLOBAL_SCALE) -> NVFP4Tensor:
    """Activations [rows, K] with a static global scale; every row is independent of the others."""
    return quantize(x, torch.tensor(global_scale))


@dataclass(frozen=True)
class ActivationRange:
    """What a static global scale covers, and how many blocks of a batch it misses.

    lowest, highest: block maxima between which the scale neither vanishes nor saturates.
    underflow: nonzero blocks whose scale rounds to zero (they become zeros).
    overflow: blocks above `highest` (they are clipped).
    """

    lowest: float
    highest: float
    blocks: int
    underflow: int
    overflow: int


def activation_range(x: Tensor, global_scale: float = ACTIVATION_GLOBAL_SCALE) -> ActivationRange:
    """Count the blocks of x [rows, K] that `global_scale` under- or overflows."""
    x = x.to(torch.float32)
    amax, scale = blocks(x).abs().amax(-1), block_scales(x, torch.tensor(global_scale)).float()
    highest = E4M3_MAX * E2M1_MAX / global_scale
    return ActivationRange(
        lowest=E4M3_TINY * E2M1_MAX / global_scale,
        highest=highest,
        blocks=amax.numel(),
        underflow=int(((scale == 0) & (amax > 0)).sum()),
        overflow=int((amax > highest).sum()),
    )


def swizzle(scales: Tensor) -> Tensor:
    """Block scales [rows, C] -> the 128x4 tiled order that tensor cores read, flat and zero-padded.

    Element (r, c) goes to ((r//128)*ceil(C/4) + c//4)*512 + (r%32)*16 + ((r//32)%4)*4 + c%4
    (cuBLAS "1D block scaling" layout; equals torchao.to_blocked and vLLM.swizzle_blockscale).
    """
    rows, cols = scales.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-cols // 4) * 4, dtype=torch.uint8, device=scales.device)
    padded[:rows, :cols] = scales.view(torch.uint8)
    tiles = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scales.dtype)
