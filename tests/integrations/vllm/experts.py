"""Tiny random mixtures of experts: Qwen3's, Qwen2's with a shared expert, GLM 4.5's, DeepSeek's and gpt-oss's."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

from tests.conftest import seeded

COMMON = {
    "vocab_size": 64, "hidden_size": 128, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048, "experts_implementation": "eager",
}  # fmt: skip
SIZES = COMMON | {"moe_intermediate_size": 64, "num_experts": 8, "num_hidden_layers": 2}
SHARED_EXPERT = {"intermediate_size": 128, "shared_expert_intermediate_size": 96}
GROUPED = COMMON | {
    "moe_intermediate_size": 64, "n_routed_experts": 8, "n_shared_experts": 1, "intermediate_size": 128, "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 1.5, "num_hidden_layers": 3, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = GROUPED | {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32,
}  # fmt: skip
"""kv_lora_rank and qk_rope_head_dim are the only ones that vLLM's CPU kernel takes."""

SMALL = 0.1
"""Of weights whose sums go over that rank: larger ones make kernel noise of 1e-5."""


def qwen3_moe() -> PreTrainedModel:
    return _made("Qwen3Moe", SIZES, head_dim=32)


def qwen2_moe() -> PreTrainedModel:
    return _made("Qwen2Moe", SIZES | SHARED_EXPERT)


def glm4_moe() -> PreTrainedModel:
    return _biased(_made("Glm4Moe", GROUPED, head_dim=32, use_qk_norm=True, attention_bias=True))


def deepseek_v2() -> PreTrainedModel:
    """Without a low rank of queries, as in the Lite model."""
    return _made("DeepseekV2", LATENT, SMALL, q_lora_rank=None, topk_method="group_limited_greedy")


def deepseek_v3() -> PreTrainedModel:
    routing = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}  # vLLM's own names, which the checkpoint has too
    return _biased(_made("DeepseekV3", LATENT, SMALL, q_lora_rank=64, **routing))


def gpt_oss() -> PreTrainedModel:
    sizes = {"num_local_experts": 8, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    return _biased(_made("GptOss", COMMON | sizes))


def _made(family: str, sizes: dict[str, object], std: float = 0.15, **more: object) -> PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**sizes, **more)
    return seeded(getattr(transformers, f"{family}ForCausalLM")(config).float(), std)


def _biased(model: PreTrainedModel) -> PreTrainedModel:
    """Give what starts as zero seeded numbers: biases, and the corrections by which routers balance experts."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model
