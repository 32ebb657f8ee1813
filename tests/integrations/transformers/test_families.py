"""Models of many shapes, compiled ones too, equal their two models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel

import mixquant
from tests.conftest import PHASE, VOCABULARY, seeded
from tests.integrations.transformers.reference import TwoModels, assert_answers

Prompts = list[Tensor]


TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FAMILIES = {
    "biases": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64, "num_key_value_heads": 4}),
    "fused projections": ("Phi3Config", {}),
    "sliding window": (
        "Gemma3TextConfig", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "convolution state": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "experts": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2},
    ),
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    import transformers

    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**TINY | changes)
    model = AutoModelForCausalLM.from_config(config).double()
    if family == "experts":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return seeded(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families_equal_two_models(prompts: Prompts, family: str) -> None:
    model = build(family)
    phase = mixquant.convert_(copy.deepcopy(model), PHASE)
    for options in ({}, {"prefill_chunk_size": 7}):
        assert_answers(TwoModels.of(model), phase, prompts, **options)


def test_opt_runs_without_generate() -> None:
    """Its head calls the decoder past the base model, where the plan of a forward is made for all others."""
    model = build("biases")
    phase = mixquant.convert_(copy.deepcopy(model), PHASE)
    ids = torch.arange(3, 23).unsqueeze(0)
    alone = phase(ids).logits
    with mixquant.prompt_length(phase, ids.shape[1]):
        assert torch.equal(phase(ids).logits, alone)
    uniform = mixquant.convert_(model, "uniform-nvfp4")(ids).logits
    assert torch.equal(alone[:, :-1], uniform[:, :-1])
    assert not torch.equal(alone[:, -1], uniform[:, -1])


def compiled(backend: str, **options: Any) -> CompileConfig:
    config = CompileConfig(backend=backend, mode=None, **options)
    config._compile_all_devices = True  # otherwise generate compiles on accelerators only
    return config


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_decode_is_one_graph_and_equals_two_models(prompts: Prompts, backend: str) -> None:
    model = build("biases")  # its norms stay in float64: those in float32 differ by 1e-6 once inductor fuses them
    phase = mixquant.convert_(copy.deepcopy(model), PHASE)
    options = {"cache_implementation": "static", "compile_config": compiled(backend, fullgraph=True)}
    assert_answers(TwoModels.of(model), phase, prompts, **options)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert not counters["graph_break"]
    assert_answers(TwoModels.of(model), phase, prompts, **options)
    assert counters["stats"]["unique_graphs"] == graphs  # the second call reuses the graph


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_chunked_prefill_equals_two_models(prompts: Prompts) -> None:
    model = build("biases")
    phase = mixquant.convert_(copy.deepcopy(model), PHASE)
    options = {"cache_implementation": "static", "compile_config": compiled("eager"), "prefill_chunk_size": 7}
    assert_answers(TwoModels.of(model), phase, prompts, **options)
    assert counters["stats"]["unique_graphs"] > 0
