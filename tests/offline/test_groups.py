"""Groups: which layers share an input and its scales, and which of them are known well enough to be folded."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from mixquant.offline.groups import PROVED, Group, shared_groups
from tests.offline.models import HEAD_DIM, HEADS, VALUE_HEADS, inputs, tiny

FAMILIES = (*PROVED, "gemma2", "olmo2", "cohere", "phi3", "qwen3_moe")


@functools.cache
def built(family: str) -> PreTrainedModel:
    """One model of a family, which nobody changes."""
    return tiny(family)


def by_last_names(groups: list[Group]) -> dict[tuple[str, ...], Group]:
    """The groups of the first decoder layer, and the head, by the names of their layers."""
    first = [group for group in groups if ".layers.1." not in group.layers[0]]
    return {tuple(layer.rpartition(".")[2] for layer in group.layers): group for group in first}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_is_in_exactly_one_group(family: str) -> None:
    model = built(family)
    grouped = [layer for group in shared_groups(model) for layer in group.layers]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(grouped) == sorted(linears)


@pytest.mark.parametrize("family", PROVED)
def test_a_decoder_layer_has_four_groups_with_their_producers(family: str) -> None:
    layer, groups = "model.layers.0", by_last_names(shared_groups(built(family)))
    assert {names: group.producer for names, group in groups.items()} == {
        ("q_proj", "k_proj", "v_proj"): f"{layer}.input_layernorm",
        ("o_proj",): f"{layer}.self_attn.v_proj",
        ("gate_proj", "up_proj"): f"{layer}.post_attention_layernorm",
        ("down_proj",): f"{layer}.mlp.up_proj",
        ("lm_head",): None,
    }
    assert (groups["o_proj",].run, groups["o_proj",].repeats) == (HEAD_DIM, HEADS // VALUE_HEADS)
    assert (groups["down_proj",].run, groups["down_proj",].repeats) == (96, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_a_group_read_one_input(family: str) -> None:
    model = built(family)
    groups = shared_groups(model)
    each = [Group(layers=(layer,)) for group in groups for layer in group.layers]
    seen = {group.layers[0]: x for group, x in inputs(model, each).items()}
    for group in groups:
        assert all(torch.equal(seen[group.layers[0]], seen[layer]) for layer in group.layers)
    queries, output = seen["model.layers.0.self_attn.o_proj"], seen["model.layers.1.self_attn.o_proj"]
    assert not torch.equal(queries, output)  # control: the comparison can tell inputs apart


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PROVED)))
def test_other_decoder_layers_share_globals_and_say_why_they_do_not_fold(family: str) -> None:
    model = built(family)
    groups = shared_groups(model)
    decoder = type(model.model.layers[0]).__name__
    assert all(group.producer is None and group.reason for group in groups)
    assert any(
        group.reason == f"{decoder} is not proved to fold exactly, as {', '.join(PROVED)} are" for group in groups
    )
    if family != "phi3":  # one fused layer there
        assert ("q_proj", "k_proj", "v_proj") in by_last_names(groups)


def test_a_family_s_decoder_by_another_author_does_not_fold() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        layer.__class__ = type("LlamaDecoderLayer", (type(layer),), {"__module__": "transformers_modules.llama"})
    assert {group.producer for group in shared_groups(model)} == {None}


def test_a_group_with_a_wrapped_member_does_not_fold() -> None:
    """A LoRA-wrapped q_proj reads the norm too, but its columns are not there to be scaled."""

    class Wrapped(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer = base

    model = tiny("qwen3")
    attention = model.model.layers[0].self_attn
    attention.q_proj = Wrapped(attention.q_proj)
    groups = by_last_names(shared_groups(model))
    assert groups["k_proj", "v_proj"].producer is None
    assert groups["o_proj",].producer is not None


def test_the_meta_device_is_enough() -> None:
    with torch.device("meta"):
        assert shared_groups(tiny("qwen3").to("meta")) == shared_groups(tiny("qwen3"))
