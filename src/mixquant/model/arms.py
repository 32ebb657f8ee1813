"""One converted model in every arm: which kernel each phase gets is a matter of assignment.

    arm            prefill     decode
    phase          quantized   precise      what users run, and what the model was converted to
    uniform        quantized   quantized
    decode-only    precise     quantized
    bf16           precise     precise
    bf16-control   the same, in batches of another composition (which is the engine's business)

The layers of a model that was converted to `phase` hold both kernels, so an arm needs no second copy of the weights,
and computes what a model converted to that arm's own policy computes, bit for bit (tested).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from mixquant.checkpoint.prefill import PrefillWeights
from mixquant.errors import InputError
from mixquant.kernels.base import LinearKernel
from mixquant.layers import is_ignored
from mixquant.model.convert import Converter
from mixquant.model.explain import is_emulated, kernels_used
from mixquant.model.linear import PhaseLinear
from mixquant.policy import ARMS, CONTROL, REFERENCE, Policy, choose_name

__all__ = ["CONTROL", "REFERENCE", "holding", "kernels_in", "quantized_copy", "quantizes", "running"]

Copy = Mapping[str, LinearKernel]
"""A quantized kernel for each layer of a converted model, by its name."""


def quantizes(arm: str) -> tuple[bool, bool]:
    """Whether an arm quantizes (prefill, decode); InputError for an unknown arm."""
    return ARMS[choose_name("arm", arm, ARMS)]


@contextmanager
def running(model: nn.Module, arm: str, layers: Collection[str] | None = None) -> Iterator[None]:
    """Run `model`, converted to the phase arm, in another arm for the calls inside.

    layers: names of the only layers that are quantized; by default all.
    """
    prefill, decode = quantizes(arm)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, PhaseLinear)}
    if not found:
        raise InputError("The model has no phase-aware layer: call mixquant.convert_(model, policy) first.")
    before = [(layer, layer.prefill, layer.decode) for layer in found.values()]
    for name, layer in found.items():
        quantized, precise = layer.prefill, layer.decode
        chosen = layers is None or name in layers
        layer.prefill = quantized if chosen and prefill else precise
        layer.decode = quantized if chosen and decode else precise
    try:
        yield
    finally:
        for layer, first, second in before:
            layer.prefill, layer.decode = first, second


def quantized_copy(model: nn.Module, policy: Policy, weights: PrefillWeights | None) -> Copy:
    """The kernels of another format, scale rule or folder for the layers of a converted model.

    Layers that `ignore` names, or that the folder left in BF16, keep the checkpoint's own weight.
    """
    layers = _layers(model)
    if weights is not None:
        policy = weights.resolve(policy)
    ignored = (*policy.ignore, *(weights.ignored(layers) if weights else ()))
    converter = Converter(policy, weights)
    format = policy.prefill if policy.prefill != REFERENCE else policy.decode
    return {
        name: layer.decode if is_ignored(name, ignored) else converter.kernel(format, layer.original, name)
        for name, layer in layers.items()
    }


@contextmanager
def holding(model: nn.Module, copy: Copy | None) -> Iterator[None]:
    """Put these quantized kernels in the place of those that the model was converted with; None leaves them."""
    layers = _layers(model) if copy else {}
    before = {name: layer.prefill for name, layer in layers.items()}

    def put(kernels: Copy) -> None:
        for name, layer in layers.items():
            layer.prefill = kernels[name]

    try:
        put(copy or {})
        yield
    finally:
        put(before)


def _layers(model: nn.Module) -> dict[str, PhaseLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PhaseLinear)}


def kernels_in(model: nn.Module, arm: str) -> tuple[dict[str, list[str]], bool]:
    """Names of an arm's kernels by phase, and whether one of them is emulated."""
    with running(model, arm):
        return kernels_used(model), is_emulated(model)
