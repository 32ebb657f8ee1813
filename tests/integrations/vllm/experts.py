"""Tiny random mixtures of experts: Qwen3's, and Qwen2's with a shared expert beside the routed ones."""

from __future__ import annotations

from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tests.conftest import seeded

SIZES = {
    "vocab_size": 64, "hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "experts_implementation": "eager",
}  # fmt: skip
SHARED_EXPERT = {"intermediate_size": 128, "shared_expert_intermediate_size": 96}


def qwen3_moe() -> PreTrainedModel:
    return seeded(Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=32)).float())


def qwen2_moe() -> PreTrainedModel:
    return seeded(Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **SHARED_EXPERT)).float())
