"""Which layers are converted, told by their names and by what the model calls its head."""

from __future__ import annotations

from torch import nn

import mixquant
from mixquant.model.targets import target_linears


def tree(*names: str) -> nn.Module:
    """A model with a linear layer at each dotted name."""
    root = nn.Module()
    for name in names:
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(16, 16))
    return root


def test_heads_routers_towers_and_drafts_stay() -> None:
    decoder = [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.kv_a_proj_with_mqa",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.experts.3.up_proj",
        "model.layers.0.mlp.shared_expert.down_proj",
        "model.language_model.layers.0.linear_attn.in_proj_qkvz",
    ]
    others = [
        "lm_head",
        "embed_out",
        "model.decoder.output_projection",
        "model.layers.0.mlp.gate",
        "model.layers.0.block_sparse_moe.router",
        "model.layers.0.mlp.shared_expert_gate",
        "model.visual.blocks.0.attn.qkv",
        "vision_tower.encoder.layers.0.mlp.fc1",
        "model.audio_tower.layers.0.fc1",
        "multi_modal_projector.linear_1",
        "model.layers.0.self_attn.kv_b_proj",
        "mtp.layers.0.q_proj",
    ]
    found = [name for name, _ in target_linears(tree(*decoder, *others), mixquant.Policy())]
    assert sorted(found) == sorted(decoder)


def test_the_output_head_stays_whatever_its_name() -> None:
    model = tree("layers.0.up", "score")
    model.get_output_embeddings = lambda: model.score
    assert [name for name, _ in target_linears(model, mixquant.Policy())] == ["layers.0.up"]
