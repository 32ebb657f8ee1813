"""The recipe, and one decoder layer taken through it.

    amax      globals: one power of two for the weights of a fused group; one for their input, 16 times above what
              calibration saw (a saturated block scale is a cliff, and E4M3 has room to spare)
    fold      power-of-two factors for each channel, out of the layer's norms, values and up_proj into its weights
    search    block scales within +-8 codes of amax, columns weighted by E[x^2]
    gptq      scales and codes chosen for the layer's output, later columns making up for the error of earlier ones

GPTQ is part of the recipe wherever it applies: it is what helps most (docs/quantize.md).
Each step that is switched on is measured after those above it: calibrated, as the relative squared error of a linear
layer's output with weights *and* inputs quantized, on rows that calibration left out; otherwise as that of its
weights. FP8 and INT8 take their row scales from amax, and gain from folding alone. Whatever is computed in float32 is
computed a few rows at a time, so that temporaries stay small beside the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats import FORMATS, Quantized, Quantizer, nvfp4, quantizer, scales
from mixquant.formats.checks import check_finite, row_slices
from mixquant.offline import fold, gptq
from mixquant.offline.calibrate import InputStatistics
from mixquant.offline.calibration_text import AGENTS
from mixquant.offline.groups import Group
from mixquant.policy import QUANTIZED, Policy

HEADROOM = 16.0

Statistics = Mapping[Group, InputStatistics]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to a model; InputError for combinations that make no sense.

    policy: names the format, its scale rule and the layers to ignore. gptq: None means where it applies, which is
    NVFP4 with calibration, unless the policy asks for plain amax. calibration: `agents`, a file, or None; the formats
    that need none pass `agents` over, because it is the default, and refuse a file, because somebody named it.
    """

    policy: Policy
    fold: bool = False
    gptq: bool | None = None
    calibration: str | None = None

    def __post_init__(self) -> None:
        format = self.policy.prefill
        if format not in QUANTIZED or self.policy.decode != "bf16":
            raise InputError(
                f"A folder holds the weights of one prefill format, not prefill={format} with "
                f"decode={self.policy.decode}: use {', '.join(QUANTIZED)}."
            )
        blocks = FORMATS[format].block is not None
        if self.gptq and not blocks:
            raise InputError(f"GPTQ rounds to the NVFP4 grid, not to {format}: leave it out.")
        if self.calibration is None and (self.fold or self.gptq):
            raise InputError("Folding and GPTQ need calibration text: name a file, or agents.")
        if self.calibration not in (None, AGENTS) and not self.calibrates:
            raise InputError(
                f"{format} scales each token as it comes, and reads calibration text for folding only: leave the file "
                "out, or fold."
            )
        if self.gptq is None:
            applies = blocks and self.calibration is not None and self.policy.scales != "amax"
            object.__setattr__(self, "gptq", applies)

    @property
    def format(self) -> str:
        return self.policy.prefill

    @property
    def calibrates(self) -> bool:
        """Whether the model is run: FP8 and INT8 scale each token as it comes, and need to know their inputs for
        folding only."""
        return self.calibration is not None and (FORMATS[self.format].static_inputs or self.fold)

    @property
    def steps(self) -> list[str]:
        searches = FORMATS[self.format].block is not None and self.policy.scales == "search"
        switched = {"amax": True, "fold": self.fold, "search": searches, "gptq": bool(self.gptq)}
        return [step for step, on in switched.items() if on]


@dataclass
class QuantizedLayers:
    """One decoder layer's linear layers.

    weights: quantized, by name. activation_scales: the static global scale of a layer's input (NVFP4 only). errors:
    relative squared error by layer and step.
    """

    weights: dict[str, Quantized] = field(default_factory=dict)
    activation_scales: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def quantize_layers(
    tensors: dict[str, Tensor], groups: tuple[Group, ...], statistics: Statistics | None, recipe: Recipe
) -> QuantizedLayers:
    """Take the linear layers of a decoder layer through the recipe; folding changes `tensors` in place.

    tensors: by name in the checkpoint, finite (see `check_tensors`). statistics: GPTQ uses their `hessian` up.
    """
    result = QuantizedLayers()
    known = dict(statistics) if statistics is not None else {}
    for step in recipe.steps:
        for group in groups:
            if step == "fold":
                _fold(tensors, group, known)
        for group in groups:
            _quantize_group(tensors, group, known.get(group), recipe.format, step, result)
    return result


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError, with the tensor's name, for NaN or Inf: wherever else they show, they came from here."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            check_finite(tensor.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1), name)


def activation_scale(statistics: InputStatistics | None) -> float:
    """NVFP4's static multiplier for a group's input: calibrated with headroom, or the format's own."""
    if statistics is None:
        return nvfp4.ACTIVATION_GLOBAL_SCALE
    return float(nvfp4.weight_global_scale(statistics.amax.max() * HEADROOM))


def _fold(tensors: dict[str, Tensor], group: Group, known: dict[Group, InputStatistics]) -> None:
    if group.producer is not None:
        factors = fold.factors(tensors, group, known[group].second_moment)
        fold.apply_(tensors, group, factors)
        known[group] = known[group].folded(factors)


def _quantize_group(
    tensors: Mapping[str, Tensor],
    group: Group,
    statistics: InputStatistics | None,
    format: str,
    step: str,
    result: QuantizedLayers,
) -> None:
    weights = {layer: tensors[f"{layer}.weight"] for layer in group.layers}
    amax = torch.stack([nvfp4.largest_magnitude(weight) for weight in weights.values()]).amax()
    scale = activation_scale(statistics)
    quantize_one = _rule(amax, statistics, format, step)
    for layer, weight in weights.items():
        result.weights[layer] = quantize_one(weight)
        if FORMATS[format].static_inputs:
            result.activation_scales[layer] = scale
        lost = _error(weight, result.weights[layer], statistics, format, scale)
        result.errors.setdefault(layer, {})[step] = lost


def _rule(amax: Tensor, statistics: InputStatistics | None, format: str, step: str) -> Quantizer:
    """How a step quantizes each weight of a group, whose largest magnitude is `amax`."""
    if FORMATS[format].block is None:
        return quantizer(format)
    if step == "gptq":
        assert statistics is not None
        assert statistics.hessian is not None
        factors = gptq.factor_(statistics.hessian, statistics.tokens)
        return functools.partial(gptq.quantize, factors=factors, global_scale=nvfp4.weight_global_scale(amax))
    importance = None if statistics is None else statistics.second_moment
    scale_rule = functools.partial(scales.search, importance=importance) if step == "search" else nvfp4.block_scales
    return functools.partial(nvfp4.quantize_weight, rule=scale_rule, amax=amax)


def _error(
    weight: Tensor, quantized: Quantized, statistics: InputStatistics | None, format: str, scale: float
) -> float:
    """Relative squared error of the layer's output, or of its weight where there are no inputs to measure it with."""
    rows = inputs = None
    if statistics is not None:
        rows = statistics.held_out
        inputs = FORMATS[format].quantize_input(rows, scale).dequantize()
    lost = power = 0.0
    for part in row_slices(*weight.shape):
        exact, found = weight[part].to(torch.float32), quantized.rows(part).dequantize()
        if rows is not None and inputs is not None:
            exact, found = rows @ exact.T, inputs @ found.T
        lost += float((found - exact).square().sum(dtype=torch.float64))
        power += float(exact.square().sum(dtype=torch.float64))
    return lost / power if power > 0 else 0.0


def mean_errors(errors: Mapping[str, Mapping[str, float]], steps: list[str]) -> dict[str, Any]:
    """The mean over layers, step by step."""
    return {step: sum(layer[step] for layer in errors.values()) / len(errors) for step in steps}
