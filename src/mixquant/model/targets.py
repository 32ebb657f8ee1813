"""Which layers of a model are converted, and which models can be.

Converted is what a decoder's forward multiplies token by token: the linear layers inside the text decoder, subclasses
that compute the same as nn.Linear among them (Falcon's). Outside of it stand output heads, vision towers and what
connects them; inside of it, but no layers of the model, the matrices of adapters (LoRA), which stay in both phases as
they are, as in vLLM.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import get_args

import torch
from torch import nn

from mixquant.errors import InputError
from mixquant.layers import EXPERTS, NEVER, check_patterns, is_ignored
from mixquant.model.tracking import CACHE_ARGUMENTS
from mixquant.policy import Policy

STATES = frozenset({"cache_params", "state", "mems", "past_buckets_states"})
"""What models call a cache that cannot say how many tokens it has seen."""

RECURRENT = frozenset({"linear_attention", "conv", "mamba", "moe", "mlp"})
"""What Transformers calls layers that keep no token by token cache (`layer_types` of a configuration)."""

_NO_KIND = (type(None), inspect.Parameter.empty)


def target_linears(model: nn.Module, policy: Policy) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every linear layer that the rule and `ignore` leave to be converted.

    Raises InputError for a model that cannot be, and for a pattern of `ignore` that names no layer.
    """
    check_model(model)
    check_patterns(policy.ignore, [name for name, module in model.named_modules() if _holds_parameters(module)])
    head = getattr(model, "get_output_embeddings", lambda: None)()
    adapters, inside = set(_adapters(model)), set(decoder(model).modules())
    patterns = (*NEVER, *policy.ignore)
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear) or not _is_linear(type(module)) or module is head:  # type: ignore[arg-type]
            continue
        if module in inside and module not in adapters and not is_ignored(name, patterns):
            yield name, module


def _holds_parameters(module: nn.Module) -> bool:
    """Whether a module is a layer, and no group of layers."""
    return next(module.parameters(recurse=False), None) is not None


def unwrap(model: nn.Module) -> nn.Module:
    """The causal language model inside PEFT's wrapper, which passes everything on to it; any other model itself."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def decoder(model: nn.Module) -> nn.Module:
    """The part of a model that reads tokens over a KV cache: without heads, towers and their connectors."""
    get = getattr(model, "get_decoder", None)
    found = get() if callable(get) else getattr(model, "base_model", None)
    return found if isinstance(found, nn.Module) else model


def _adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that PEFT has put beside the layers they adapt, which it calls `base_layer`."""
    for module in model.modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            for name, child in module.named_children():
                if name != "base_layer":
                    yield from child.modules()


@functools.cache
def _is_linear(kind: type[nn.Linear]) -> bool:
    """Whether a subclass computes what nn.Linear does: its forward is asked, on a plain layer of 3 to 2 features."""
    if kind.forward is nn.Linear.forward:
        return kind is not nn.modules.linear.NonDynamicallyQuantizableLinear  # read by attention, never called
    probe, x = nn.Linear(3, 2, device="cpu", dtype=torch.float64), torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    try:
        return torch.allclose(kind.forward(probe, x), nn.functional.linear(x, probe.weight, probe.bias))
    except Exception:  # it needs what a plain layer does not have, so it computes something else
        return False


def check_model(model: nn.Module) -> None:
    """Raise InputError where the model is converted already or its tokens' phases cannot be told."""
    name = type(model).__name__
    if getattr(model, "mixquant_policy", None) is not None:
        raise InputError("This model is already converted: load it afresh to apply another policy.")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(f"{name} is an encoder-decoder: mixquant converts decoder-only models.")
    if not _counts_tokens(model):
        raise InputError(f"{name} has no KV cache that counts its tokens: choose a model with attention over a cache.")


def _counts_tokens(model: nn.Module) -> bool:
    """Whether the model's kind of cache says how many tokens it holds; a model without `generate` need not have one.

    A cache of recurrent states alone goes by the same name as a KV cache since Transformers 5.24, so its kind is told
    by the argument's type and by the configuration's layers.
    """
    inputs = inspect.signature(model.forward).parameters
    if STATES.intersection(inputs):
        return False
    caches = [inputs[name].annotation for name in CACHE_ARGUMENTS if name in inputs]
    if not caches:
        return not hasattr(model, "generate")
    kinds = [kind for kind in get_args(caches[0]) or caches if isinstance(kind, type) and kind not in _NO_KIND]
    layers = set(getattr(getattr(model, "config", None), "layer_types", None) or ["full_attention"])
    return all(hasattr(kind, "get_seq_length") for kind in kinds) and not layers <= RECURRENT


def experts_share(model: nn.Module) -> float:
    """The share of a model's parameters that are fused experts."""
    experts = [p for name, p in model.named_parameters() if p.ndim == 3 and is_ignored(name, (EXPERTS,))]
    return sum(p.numel() for p in experts) / sum(p.numel() for p in model.parameters())
