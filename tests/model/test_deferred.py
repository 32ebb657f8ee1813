"""Norms and MLPs that leave their output to the layers that read it: which ones, what is exact, what a tensor sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3MLP, Qwen3RMSNorm

import mixquant
from mixquant.model import producers
from mixquant.model.deferred import Deferred, Gated, Normed
from mixquant.phase import DECODE_ONLY
from tests.kernels import triton_apart
from tests.model.deferring import converted, plain_model


@pytest.mark.slow
@pytest.mark.skipif(not triton_apart.TRITON.exists(), reason="no Triton: `make test` puts it into .venv/triton")
def test_a_model_that_defers_gives_the_bits_of_one_that_does_not() -> None:
    """Of the seven layers of a block only one quantizes alone; the tail's rows are the model's own."""
    found = triton_apart.run_apart("deferred")
    assert found["quantized alone"] == [2, 14]
    assert (found["logits"], found["first decode rows"], found["with grad"]) == (0, 0, True)
    assert found["steps"] == [0] * 4
    assert found["control"] > 0.05


@pytest.mark.parametrize(
    ("module", "epsilon"),
    [
        (LlamaRMSNorm(32, eps=1e-5), 1e-5),
        (Qwen3RMSNorm(32), 1e-6),
        (Gemma2RMSNorm(32), None),  # 1 + weight
        (Olmo2RMSNorm(32), None),  # the weight before the rounding
        (nn.LayerNorm(32), None),
        (nn.RMSNorm(32, eps=1e-6), None),
        (nn.Linear(32, 32, bias=False), None),
    ],
)
def test_a_norm_is_known_by_what_it_computes(module: nn.Module, epsilon: float | None) -> None:
    assert producers.rms_norm(module) == epsilon


def test_a_swiglu_is_known_by_what_it_computes() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    assert producers.is_swiglu(Qwen3MLP(Qwen3Config(**sizes)))
    assert producers.is_swiglu(LlamaMLP(LlamaConfig(**sizes)))
    assert not producers.is_swiglu(LlamaMLP(LlamaConfig(**sizes, hidden_act="gelu")))
    assert not producers.is_swiglu(Phi3MLP(Phi3Config(**sizes)))  # one matrix for gate and up
    assert not producers.is_swiglu(nn.Linear(2, 2))


@pytest.mark.slow
def test_a_compiled_decode_step_stays_one_graph() -> None:
    model = converted(plain_model(torch.device("cpu")))
    model.mixquant_tracker.state.plan = DECODE_ONLY
    block, x = model.model.layers[0], torch.randn(1, 3, 64).bfloat16()
    for module in (block.input_layernorm, block.mlp):
        assert "forward" in vars(module)
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), module(x))


def test_what_a_model_hands_out_is_a_plain_tensor() -> None:
    model = converted(plain_model(torch.device("cpu")))
    assert {name for name, module in model.named_modules() if "forward" in vars(module)} == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("input_layernorm", "post_attention_layernorm", "mlp")
    }


def test_models_without_such_layers_keep_their_forwards() -> None:
    model = mixquant.convert_(plain_model(torch.device("cpu")), "nvfp4")
    assert not any("forward" in vars(module) for module in model.model.layers.modules())


def test_every_operation_but_a_linear_layer_s_sees_a_tensor() -> None:
    gate, up = torch.randn(2, 2, 3, 32).bfloat16()
    deferred = Deferred(Gated((gate.flatten(0, 1), up.flatten(0, 1))), gate)
    assert (deferred.shape, deferred.dtype, deferred.device) == (gate.shape, gate.dtype, gate.device)
    assert deferred.pending is not None  # asking for these computes nothing
    expected = nn.functional.silu(gate) * up
    assert torch.equal(deferred + 0, expected)
    assert deferred.pending is None
    weight = torch.randn(5, 32).bfloat16()
    assert torch.equal(nn.functional.linear(deferred, weight), nn.functional.linear(expected, weight))
    deferred.add_(1)  # what is written to it is seen by who reads it next
    assert torch.equal(deferred.reshape(-1, 32), (expected + 1).reshape(-1, 32))


def test_rows_are_computed_by_the_model_s_own_code() -> None:
    x, norm = torch.randn(6, 32).bfloat16(), Qwen3RMSNorm(32).bfloat16()
    rows = Normed((x,), norm.weight, 1e-6, norm.forward)
    assert torch.equal(rows.compute(), norm(x))
    assert torch.equal(rows[2:4].compute(), norm(x)[2:4])
    assert torch.equal(rows.index_select(0, torch.tensor([5, 1])).compute(), norm(x)[[5, 1]])
