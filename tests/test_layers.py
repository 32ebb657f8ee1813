"""Which layers are quantized, by their names."""

from __future__ import annotations

import pytest

from mixquant.layers import EXPERTS, NEVER, is_ignored

DECODER = "model.layers.3."


@pytest.mark.parametrize(
    "name",
    ["lm_head", DECODER + "mlp.gate", "visual.blocks.0.attn.qkv", DECODER + "self_attn.kv_b_proj", "mtp.layers.0.fc"],
)
def test_layers_that_stay_as_they_are(name: str) -> None:
    assert is_ignored(name, NEVER)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.gate_proj", "mlp.gate_up_proj", "mlp.experts.7.down_proj"])
def test_control_a_decoders_linears_are_quantized(name: str) -> None:
    assert not is_ignored(DECODER + name, NEVER)


def test_patterns_are_of_the_whole_name() -> None:
    name = DECODER + "mlp.experts.down_proj"
    assert is_ignored(name, ("*.q_proj", "*.down_proj"))
    assert is_ignored(name, (EXPERTS,))
    assert not is_ignored(name, ("down_proj", "*.DOWN_PROJ", "*.mlp"))
    assert not is_ignored(name, ())
