"""Which linear layers read one input, which share an NVFP4 global scale, and what stands before them.

Engines fuse layers that read the same input (q/k/v, gate/up) into one, with one global scale for the weight and one
for the activations: such layers form a group, recognised by their names. What produces the input can take over a
power of two per channel from the group's weights (`mixquant.offline.fold`), where the producer is linear in its
parameters and nothing else reads its output. That is a property of a decoder layer's code and not of its names:
Gemma's norm multiplies by 1 + weight, Olmo 2's stands behind the layer it is named after, and an MoE's is read by the
router too. So only decoder layers whose code was read, and whose folding the tests show to be exact bit for bit, have
producers; for all others the group says why not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from mixquant.layers import FUSED

PROVED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of Transformers whose decoder layer has the `PRODUCERS` below."""

PRODUCERS = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("self_attn.o_proj",): "self_attn.v_proj",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}
"""What a group of layers in a decoder layer reads: a norm's output, the values under attention, or gated up_proj."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Linear layers that read one input [*, K], and share their weights' and their input's global scale.

    layers: full module names, at least one. producer: the module that scales the input channel by channel, or None;
    then `reason` says why there is none. run, repeats: producer channels stand in the input in runs of `run`, each run
    `repeats` times over (grouped-query attention: head_dim and query heads per value head; otherwise K and 1).
    """

    layers: tuple[str, ...]
    producer: str | None = None
    reason: str = ""
    run: int = 0
    repeats: int = 1


def shared_groups(model: nn.Module) -> list[Group]:
    """Every linear layer of `model`, which may be on the meta device, in exactly one group; in the model's order."""
    members: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            siblings = next((fused for fused in FUSED if child in fused), (child,))
            members.setdefault((parent, siblings), []).append(name)
    return [_group(model, tuple(names)) for names in members.values()]


def _group(model: nn.Module, layers: tuple[str, ...]) -> Group:
    """The group with its producer, or with the reason why it has none."""
    prefix = layers[0].rpartition(".")[0].rpartition(".")[0]
    decoder = model.get_submodule(prefix)
    producer = PRODUCERS.get(tuple(name.removeprefix(f"{prefix}.") for name in layers))
    if producer is None:
        return Group(layers=layers, reason="what stands before it is not known by its name")
    if type(decoder).__module__ not in {f"transformers.models.{family}.modeling_{family}" for family in PROVED}:
        known = ", ".join(PROVED)
        return Group(layers=layers, reason=f"{type(decoder).__name__} is not proved to fold exactly, as {known} are")
    first: Any = model.get_submodule(layers[0])
    attention: Any = decoder.get_submodule("self_attn")
    run, repeats = first.in_features, 1
    if producer == "self_attn.v_proj":
        run, repeats = attention.head_dim, attention.num_key_value_groups
    return Group(layers=layers, producer=f"{prefix}.{producer}", run=run, repeats=repeats)
