"""What runs in a converted model: the kernel of every layer in each phase, and what its activation scales miss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixquant.errors import InputError
from mixquant.formats.nvfp4 import ActivationRange, activation_range
from mixquant.kernels.base import LinearKernel
from mixquant.model.linear import PhaseLinear


def explain(model: nn.Module) -> list[dict[str, Any]]:
    """One row per converted layer: name, shape [N, K], kernel and format in each phase, and whether it is emulated."""
    rows = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, PhaseLinear):
            row = {"name": name, "shape": [layer.out_features, layer.in_features]}
            rows.append(row | {phase: _describe(getattr(layer, phase)) for phase in ("prefill", "decode")})
    if not rows:
        raise InputError("The model has no phase-aware layer: call mixquant.convert_(model, policy) first.")
    return rows


@torch.no_grad()
def activation_ranges(model: nn.Module, input_ids: Tensor) -> dict[str, ActivationRange]:
    """How many blocks of each NVFP4 layer's input the static global scale misses, over one forward of `input_ids`."""
    counts: dict[str, ActivationRange] = {}

    def watch(name: str, layer: PhaseLinear) -> RemovableHandle:
        scale = getattr(layer.prefill, "activation_global_scale", None)

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if scale is not None:
                counts[name] = activation_range(args[0].flatten(0, -2), scale)

        return layer.register_forward_pre_hook(count)

    handles = [watch(name, layer) for name, layer in model.named_modules() if isinstance(layer, PhaseLinear)]
    try:
        model(input_ids=input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def kernels_used(model: nn.Module) -> dict[str, list[str]]:
    """Names of the kernels that run in each phase."""
    layers = list(phase_linears(model))
    return {phase: sorted({getattr(layer, phase).name for layer in layers}) for phase in ("prefill", "decode")}


def is_emulated(model: nn.Module) -> bool:
    """Whether any layer runs an emulated kernel in any phase: then no time of this model may be shown."""
    return any(layer.prefill.emulated or layer.decode.emulated for layer in phase_linears(model))


def _describe(kernel: LinearKernel) -> dict[str, Any]:
    return {"kernel": kernel.name, "format": kernel.format, "emulated": kernel.emulated}


def phase_linears(model: nn.Module) -> Iterator[PhaseLinear]:
    return (module for module in model.modules() if isinstance(module, PhaseLinear))
