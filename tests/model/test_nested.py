"""Nested weights in a model: half the bits, the same BF16 weights, and the same numbers wherever they multiply."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

import mixquant
from mixquant.kernels import layer
from mixquant.kernels.emulation import EmulatedPlane
from mixquant.model import arms
from mixquant.model.convert import convert_
from mixquant.model.explain import kernels_used
from tests.conftest import tiny_qwen3
from tests.formats.inputs import same_bits
from tests.kernels.native import Native

NESTED = {"prefill": "fp8", "storage": "nested", "tail": 1}
IDS = torch.arange(1, 25).unsqueeze(0)


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return tiny_qwen3(torch.bfloat16)


def converted(original: nn.Module, policy: dict[str, object]) -> nn.Module:
    return convert_(copy.deepcopy(original), policy)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model(IDS).logits
    return out


def test_twelve_bits_hold_both_precisions() -> None:
    original = tiny_qwen3(torch.bfloat16, num_hidden_layers=1, hidden_size=256, intermediate_size=1024, head_dim=64)
    weights = sum(m.weight.numel() for n, m in original.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    rest = sum(parameter.nbytes for parameter in original.parameters()) - 2 * weights
    bill = mixquant.memory(convert_(original, NESTED))
    assert 8 * (bill.total_bytes - rest) / weights == pytest.approx(12, rel=0.03)  # and 8 bytes a row
    assert bill.prefill_bytes == 0
    assert bill.overhead_ratio < 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("policy", [NESTED, NESTED | {"prefill": "nvfp4"}, NESTED | {"decode": "fp8"}])
def test_the_bill_before_conversion_is_the_bill_after_it(policy: dict[str, str], tied: bool) -> None:
    """To the byte where no weight is an escape: with two bits of mantissa, none is."""
    original = tiny_qwen3(torch.bfloat16, tie_word_embeddings=tied)
    for parameter in original.parameters():
        parameter.data.copy_(parameter.data.view(torch.int16).bitwise_and(~31).view(torch.bfloat16).clamp(min=2**-9))
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(original.config).to(torch.bfloat16)
    planned = mixquant.memory(shapes, policy, device="cpu")
    assert planned == mixquant.memory(original, policy) == mixquant.memory(converted(original, policy))
    assert planned.layers == 3 * 7
    assert planned.nested_layers == (0 if policy.get("decode") == "fp8" else 3 * 7)


def test_every_weight_is_the_original_bit_for_bit(original: PreTrainedModel) -> None:
    model = converted(original, NESTED)
    logits(model)
    for name, value in original.state_dict().items():
        assert same_bits(model.state_dict()[name], value), name
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    expected = original.get_submodule("model.layers.1.mlp.up_proj").weight
    assert same_bits(layer.weight.as_subclass(Tensor), expected.data)  # type: ignore[arg-type, union-attr]
    with pytest.raises(mixquant.InputError, match="weight cannot be written"):
        layer.weight.data += 1  # type: ignore[union-attr, operator]


def test_decode_computes_as_with_separate_weights(original: PreTrainedModel) -> None:
    """All rows decode: not one bit differs. With a prompt, the plane's numbers are not those of separate codes."""
    nested, separate = (converted(original, NESTED | {"storage": s, "tail": 99}) for s in ("nested", "separate"))
    assert torch.equal(logits(nested), logits(separate))
    nested, separate = (converted(original, NESTED | {"storage": s}) for s in ("nested", "separate"))
    assert not torch.equal(logits(nested), logits(separate))


def test_nvfp4_prompts_are_read_as_with_separate_weights(original: PreTrainedModel) -> None:
    nested, separate = (
        converted(original, NESTED | {"prefill": "nvfp4", "storage": s}) for s in ("nested", "separate")
    )
    assert torch.equal(logits(nested), logits(separate))
    assert not torch.equal(logits(nested), logits(original))


def test_arms_of_one_model_are_what_their_own_policies_give(original: PreTrainedModel) -> None:
    model, policies = converted(original, NESTED), {"uniform": NESTED | {"decode": "fp8"}, "bf16": {"prefill": "bf16"}}
    said = {}
    for arm, policy in policies.items():
        with arms.running(model, arm):
            said[arm] = logits(model)
        assert torch.equal(said[arm], logits(converted(original, policy)))
    assert not torch.equal(said["uniform"], said["bf16"])
    assert not torch.equal(
        said["uniform"], logits(converted(original, NESTED | {"decode": "fp8", "storage": "separate"}))
    )


def test_explain_names_the_kernels(original: PreTrainedModel) -> None:
    model = converted(original, NESTED)
    assert mixquant.explain(model)[0] == {
        "name": "model.layers.0.self_attn.q_proj",
        "shape": [64, 64],
        "prefill": {"kernel": "emulation.fp8", "format": "fp8", "emulated": True},
        "decode": {"kernel": "emulation.nested", "format": "bf16", "emulated": True},
    }
    assert kernels_used(model) == {"prefill": ["emulation.fp8"], "decode": ["emulation.nested"]}


def test_tied_weights_share_one_nested_weight(original: PreTrainedModel) -> None:
    tied = copy.deepcopy(original)
    first, second = (tied.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1))
    second.weight = first.weight
    planned = mixquant.memory(tied, NESTED)
    model = convert_(tied, NESTED)
    first, second = (model.get_submodule(f"model.layers.{i}.mlp.up_proj") for i in (0, 1))
    assert first.decode is second.decode
    assert first.prefill is second.prefill
    assert planned.nested_layers == mixquant.memory(model).nested_layers == 3 * 7 - 1


def with_escapes(original: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(original)
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[:, 1:9] = 1.7e-8  # type: ignore[union-attr, operator]
    return model


def test_a_layer_with_too_many_escapes_is_named(original: PreTrainedModel) -> None:
    words = r"model.layers.1.mlp.up_proj: 1\d\d of 1024 weights in 16 rows .* use storage=separate, or add the layer"
    with pytest.raises(mixquant.InputError, match=words):
        converted(with_escapes(original), NESTED)
    model = convert_(with_escapes(original), NESTED | {"ignore": ["*.1.mlp.up_proj"]})
    assert mixquant.memory(model).nested_layers == 3 * 7 - 1


def test_auto_keeps_such_a_layer_separate_and_says_so(
    original: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "NESTED", (Native,))
    with pytest.warns(
        UserWarning, match=r"1 layers keep separate weights .*first model.layers.1.mlp.up_proj: 1\d\d of"
    ):
        model = convert_(with_escapes(original), {"prefill": "fp8", "storage": "auto"})
    assert mixquant.memory(model).nested_layers == 3 * 7 - 1
    assert kernels_used(model)["decode"] == sorted(
        ["test.nested", kernels_used(converted(original, {"prefill": "bf16"}))["decode"][0]]
    )
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj").prefill, EmulatedPlane)


def test_a_shape_that_does_not_nest_is_refused_before_any_layer_changes() -> None:
    model = tiny_qwen3(torch.bfloat16, intermediate_size=96)
    words = r"model.layers.0.mlp.down_proj of shape \[64, 96\]: nested weights need N .* use storage=separate, or add"
    with pytest.raises(mixquant.InputError, match=words):
        convert_(model, NESTED)
    assert isinstance(model.get_submodule("model.layers.0.self_attn.q_proj"), nn.Linear)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_weight_names_the_layer(original: PreTrainedModel, value: float) -> None:
    model = copy.deepcopy(original)
    model.get_submodule("model.layers.2.mlp.up_proj").weight.data[3, 5] = value  # type: ignore[union-attr, operator]
    with pytest.raises(mixquant.InputError, match=r"layers\.2\.mlp\.up_proj: .*1 NaN or Inf.*intact checkpoint"):
        convert_(model, NESTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_do_not_nest(dtype: torch.dtype) -> None:
    with pytest.raises(mixquant.InputError, match=r"only bfloat16 weights nest, not .*: use storage=separate"):
        convert_(tiny_qwen3(dtype), {"prefill": "nvfp4", "storage": "nested"})
