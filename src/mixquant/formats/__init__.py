"""Number formats as readable references: they define the truth that every kernel is compared to.

What. `FORMATS` is the one place that says how formats differ: every other module asks the table, none asks for a name.
How. A matrix goes in, an `NVFP4Tensor` or a `RowwiseTensor` comes out; both know their `rows`, `dequantize` and, in
float64, `matmul`. BF16 is not in the table: it is what a layer is that no format quantizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mixquant.formats import fp8, int8, nvfp4
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.formats.scales import RULES

Quantized = NVFP4Tensor | RowwiseTensor
"""A matrix [rows, K] in a quantized format."""

Quantizer = Callable[[Tensor], Quantized]
"""A weight [N, K] in the model's dtype -> the same in a quantized format."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What there is to know of a format.

    block: values along K that share a scale; None: one scale a row.
    static_inputs: activations have one static scale, for calibration to set; otherwise each token has its own.
    quantize_weight: a weight [N, K]; with blocks, also the rule for their scales and amax (see `quantizer`).
    quantize_input: activations [rows, K] and their static scale.
    """

    block: int | None
    static_inputs: bool
    quantize_weight: Callable[..., Quantized]
    quantize_input: Callable[[Tensor, float], Quantized]

    @property
    def multiple(self) -> int:
        """What K must be a multiple of."""
        return self.block or 1


def _by_row(quantize: Quantizer) -> Format:
    """Weights by their rows, and activations by theirs, the tokens."""
    return Format(block=None, static_inputs=False, quantize_weight=quantize, quantize_input=lambda x, _: quantize(x))


FORMATS = {
    "nvfp4": Format(
        block=nvfp4.BLOCK,
        static_inputs=True,
        quantize_weight=nvfp4.quantize_weight,
        quantize_input=nvfp4.quantize_activation,
    ),
    "fp8": _by_row(fp8.quantize),
    "int8": _by_row(int8.quantize),
}
"""Every quantized format by the name that a policy uses."""


def quantizer(format: str, scales: str = "search", amax: Tensor | None = None) -> Quantizer:
    """How weights get into a format. Formats with one scale a row leave nothing to choose, and ignore both options.

    scales: the rule for block scales, a key of `scales.RULES`. amax: the largest magnitude, float32 [], of all that
    shares a global scale (the whole weight of which this is a tensor-parallel shard, or a fused group); None: its own.
    """
    quantize = FORMATS[format].quantize_weight
    return functools.partial(quantize, rule=RULES[scales], amax=amax) if FORMATS[format].block else quantize
