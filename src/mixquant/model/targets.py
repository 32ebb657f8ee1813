"""Which layers of a model are converted, and which models can be."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import get_args

from torch import nn

from mixquant.errors import InputError
from mixquant.layers import EXPERTS, NEVER, is_ignored
from mixquant.model.tracking import CACHE_ARGUMENTS
from mixquant.policy import Policy

STATES = frozenset({"cache_params", "state", "mems", "past_buckets_states"})
"""What models call a cache that cannot say how many tokens it has seen."""

RECURRENT = frozenset({"linear_attention", "conv", "mamba", "moe", "mlp"})
"""What Transformers calls layers that keep no token by token cache (`layer_types` of a configuration)."""

_NO_KIND = (type(None), inspect.Parameter.empty)


def target_linears(model: nn.Module, policy: Policy) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every linear layer that the rule and `ignore` leave to be converted."""
    check_model(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    patterns = (*NEVER, *policy.ignore)
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and module is not head and not is_ignored(name, patterns):
            yield name, module


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
