"""What FP8 and INT8 share: codes with one FP32 scale per row (an output channel of weights, a token of activations).

value = code * scale, symmetric. Rows of zeros, or of values below 2^-100, get scale 1 and zero codes. Both kinds of
code are exact in BF16, so a BF16 product of codes with both scales in the epilogue equals the tensor-core instruction
up to summation order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixquant.formats.checks import row_chunks

SMALLEST_AMAX = 2.0**-100
"""Rows below it become zeros: the reciprocals of their scales would leave FP32."""


@dataclass(frozen=True)
class RowwiseTensor:
    """codes: int8 or float8_e4m3fn [rows, K]; scales: float32 [rows, 1]."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def tensors(self) -> dict[str, Tensor]:
        """A layer's tensors under compressed-tensors' names."""
        return {"weight": self.codes, "weight_scale": self.scales}

    def rows(self, rows: slice) -> RowwiseTensor:
        """Some of the rows, as views."""
        return RowwiseTensor(self.codes[rows], self.scales[rows])

    def dequantize(self) -> Tensor:
        """float32 [rows, K]: code * scale."""
        return self.codes.to(torch.float32) * self.scales

    def matmul(self, weight: RowwiseTensor) -> Tensor:
        """self @ weight.T in float64 from exact products: [M, K], [N, K] -> float64 [M, N]. The truth for kernels."""
        return (self.codes.double() @ weight.codes.double().T) * self.scales.double() * weight.scales.double().T


def row_scales(x: Tensor, code_max: float) -> Tensor:
    """Scale that puts each row's largest magnitude at `code_max`: float32 [rows, K] -> [rows, 1]."""
    amax = x.abs().amax(-1, keepdim=True)
    return torch.where(amax <= SMALLEST_AMAX, torch.ones_like(amax), amax * (1.0 / code_max))  # NaN stays NaN


def quantize_rows(x: Tensor, code_max: float, round_codes: Callable[[Tensor], Tensor]) -> RowwiseTensor:
    """Scale each row of a matrix [rows, K] to `code_max` and round; `round_codes` maps float32 to codes."""
    parts = []
    for chunk in row_chunks(x):
        values = chunk.to(torch.float32)
        scales = row_scales(values, code_max)
        parts.append((round_codes((values * (1.0 / scales)).clamp(-code_max, code_max)), scales))
    codes, scales = (torch.cat(column) for column in zip(*parts, strict=True))
    return RowwiseTensor(codes, scales)
