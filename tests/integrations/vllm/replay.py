"""Why two runs differ: rounding to FP4 is discontinuous.

Two correct engines differ by kernel noise (1e-7). An activation that lies within that noise of the border between two
codes becomes one code here and the other there, and from then on the request differs by what a code is worth. That is
no error, and this module proves it for a request: among the inputs of all quantized layers, in order of execution, the
first whose codes differ must differ in exactly one FP4 code (or one block scale) while its values differ by noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixquant.formats import nvfp4
from tests.integrations.vllm.recording import LayerInputs

NOISE = 1e-5
"""Largest difference between inputs that counts as kernel noise, as a share of their largest magnitude."""


@dataclass(frozen=True)
class Difference:
    """The first layer whose quantized inputs differ: how many FP4 codes and block scales, and by what noise."""

    layer: str
    codes: int
    scales: int
    noise: float

    @property
    def is_one_flip(self) -> bool:
        return self.codes + self.scales == 1 and self.noise < NOISE


def first_difference(one: LayerInputs, other: LayerInputs, tail: int = 1) -> Difference | None:
    """Compare the prefill rows that both runs computed; None if every code is the same."""
    assert one.keys() == other.keys()
    for layer in one:
        a, b = _common_rows(one[layer], other[layer], tail)
        scales, codes = differing_codes(a, b)
        if scales or codes:
            return Difference(layer, codes, scales, float((a - b).abs().max() / a.abs().max()))
    return None


def _common_rows(a: Tensor, b: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    prefill = torch.arange(len(a)) < len(a) - tail
    rows = prefill & ~(a.isnan() | b.isnan()).any(1)
    return a[rows], b[rows]


def differing_codes(a: Tensor, b: Tensor) -> tuple[int, int]:
    """How many (block scales, FP4 codes) differ between two activations [rows, K]; codes under a scale that differs
    are not counted again."""
    if not len(a):
        return 0, 0
    one, other = nvfp4.quantize_activation(a.float()), nvfp4.quantize_activation(b.float())
    scales = one.scales.float() != other.scales.float()
    codes = nvfp4.unpack(one.packed) != nvfp4.unpack(other.packed)
    codes &= ~scales.repeat_interleave(nvfp4.BLOCK, 1)
    return int(scales.sum()), int(codes.sum())
