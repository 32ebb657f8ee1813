"""convert_: which layers change, what they keep of the original, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Mamba2Config,
    Mamba2ForCausalLM,
    PreTrainedModel,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    xLSTMConfig,
    xLSTMForCausalLM,
)

import mixquant
from mixquant.kernels import select
from mixquant.model.linear import PhaseLinear
from tests.conftest import PHASE, seeded, tiny_qwen3
from tests.integrations.transformers.reference import CONTROL, EXACT, FakeQuantLinear, difference, quantized_copy


class Block(nn.Module):
    """A feed-forward layer and nothing else: tokens do not see each other."""

    def __init__(self, hidden: int = 32, inner: int = 64, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(hidden, inner, bias=bias)
        self.down = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class HandwrittenLM(nn.Module):
    """A causal language model that Transformers knows nothing of."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.lm_head = nn.Linear(32, 64)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


@pytest.fixture
def handwritten() -> nn.Module:
    return seeded(HandwrittenLM().double(), std=0.4)


def phase_layers(model: nn.Module) -> dict[str, PhaseLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PhaseLinear)}


def linear_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_all_linear_layers_but_the_head_are_converted(plain: PreTrainedModel, phase: PreTrainedModel) -> None:
    assert set(phase_layers(phase)) == linear_names(plain) - {"lm_head"}
    assert linear_names(phase) == {"lm_head"}


def test_ignored_layers_stay(plain: PreTrainedModel) -> None:
    policy = {"prefill": "nvfp4", "ignore": ["*.o_proj", "model.layers.1.*"]}
    model = mixquant.convert_(copy.deepcopy(plain), policy)
    stayed = linear_names(model) - {"lm_head"}
    assert stayed == {n for n in linear_names(plain) if n.endswith("o_proj") or n.startswith("model.layers.1.")}


def test_a_layer_keeps_its_bias_and_shape(handwritten: nn.Module) -> None:
    linear = handwritten.layers[0].up
    layer = mixquant.convert_(handwritten, "nvfp4").layers[0].up
    assert layer.bias is linear.bias
    assert (layer.in_features, layer.out_features) == (32, 64)
    assert torch.equal(layer.weight, linear.weight)
    assert repr(layer) == "PhaseLinear(32, 64, bias=True, prefill=emulation.nvfp4, decode=torch.linear)"


def test_tied_weights_share_kernels_and_storage(handwritten: nn.Module) -> None:
    first, second = handwritten.layers
    second.up.weight = first.up.weight
    address = first.up.weight.data_ptr()
    mixquant.convert_(handwritten, "nvfp4")
    assert second.up is not first.up
    assert second.up.bias is not first.up.bias
    assert second.up.prefill is first.up.prefill
    assert second.up.decode is first.up.decode
    assert first.up.weight.data_ptr() == address
    assert second.down.prefill is not first.down.prefill


def test_a_shared_module_stays_shared(handwritten: nn.Module) -> None:
    handwritten.layers[1] = handwritten.layers[0]
    handwritten.extra = handwritten.layers[0].up
    mixquant.convert_(handwritten, "nvfp4")
    assert handwritten.layers[1].up is handwritten.layers[0].up
    assert handwritten.extra is handwritten.layers[0].up
    assert isinstance(handwritten.extra, PhaseLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ["nvfp4", "fp8", "int8"])
def test_state_dict_is_the_original_bit_for_bit(dtype: torch.dtype, policy: str) -> None:
    original = tiny_qwen3(dtype, tie_word_embeddings=True)
    model = mixquant.convert_(copy.deepcopy(original), policy)
    kernel = model.model.layers[0].mlp.up_proj.decode
    assert kernel.name == select("bf16", torch.device("cpu"), dtype).name
    expected, saved = original.state_dict(), model.state_dict()
    assert list(saved) == list(expected)
    for name, value in expected.items():
        assert saved[name].dtype == value.dtype
        assert torch.equal(saved[name], value)


def test_a_uniform_model_has_no_original_weights_and_says_so(converted: object) -> None:
    model = converted("uniform-nvfp4")
    with pytest.raises(mixquant.InputError, match="keeps no original weight: load the original model"):
        model.state_dict()


@pytest.mark.parametrize("move", [{"dtype": torch.float32}, {"device": "meta"}])
def test_moving_or_casting_is_refused_and_changes_nothing(plain: PreTrainedModel, move: dict[str, object]) -> None:
    model = mixquant.convert_(copy.deepcopy(plain), "nvfp4")
    with pytest.raises(mixquant.InputError, match="move or cast it first, then convert"):
        model.to(**move)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model.to(dtype=torch.float64, device="cpu") is model


def test_progress_sees_every_layer_in_order(plain: PreTrainedModel) -> None:
    seen: list[str] = []

    def progress(names: list[str]) -> object:
        for name in names:
            yield name
            seen.append(name)

    model = mixquant.convert_(copy.deepcopy(plain), "nvfp4", progress)
    assert seen == list(phase_layers(model))


def test_a_model_without_transformers_follows_the_forward_rule(handwritten: nn.Module) -> None:
    quantized = quantized_copy(handwritten)
    model = mixquant.convert_(copy.deepcopy(handwritten), PHASE)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        plain_logits, quantized_logits = handwritten(ids), quantized(ids)

        def split(*lengths: int) -> Tensor:
            """Each row's logits: quantized before its length, plain from there on."""
            prefill = torch.arange(10) < torch.tensor(lengths).unsqueeze(1)
            return torch.where(prefill.unsqueeze(-1), quantized_logits, plain_logits)

        assert difference(model(ids), split(9, 9)) < EXACT
        assert difference(model(input_ids=ids), split(9, 9)) < EXACT
        with mixquant.prompt_length(model, [4, 7]):
            assert difference(model(ids), split(3, 6)) < EXACT
    assert difference(split(9, 9), split(3, 6)) > CONTROL
    assert difference(split(9, 9), split(10, 10)) > CONTROL


def refused_untouched(model: nn.Module, policy: object, message: str) -> None:
    original = copy.deepcopy(model)
    with pytest.raises(mixquant.InputError, match=message):
        mixquant.convert_(model, policy)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert not phase_layers(model)
    assert not hasattr(model, "mixquant_policy")


def test_an_unfit_width_names_the_layer_and_changes_nothing(handwritten: nn.Module) -> None:
    handwritten.layers.append(Block(32, 40).double())
    refused_untouched(handwritten, "nvfp4", r"layers\.2\.down of shape \[32, 40\]: .*multiple of 16.*`ignore`")
    mixquant.convert_(handwritten, {"prefill": "nvfp4", "ignore": ["layers.2.down"]})


def test_rowwise_formats_take_any_width(handwritten: nn.Module) -> None:
    handwritten.layers.append(Block(32, 40).double())
    assert "layers.2.down" in phase_layers(mixquant.convert_(handwritten, "fp8"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_weight_names_the_layer(handwritten: nn.Module, value: float) -> None:
    handwritten.layers[1].up.weight.data[3, 5] = value
    with pytest.raises(mixquant.InputError, match=r"layers\.1\.up: .*1 NaN or Inf.*intact checkpoint"):
        mixquant.convert_(handwritten, "nvfp4")


SMALL = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 32}

UNFIT = {
    "encoder-decoder": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1)),
        "T5ForConditionalGeneration is an encoder-decoder",
    ),
    "recurrent state": (
        lambda: Mamba2ForCausalLM(Mamba2Config(**SMALL, state_size=16, num_heads=4, head_dim=16, n_groups=1)),
        "Mamba2ForCausalLM has no KV cache",
    ),
    "recurrent state in a cache class of its own": (
        lambda: xLSTMForCausalLM(xLSTMConfig(vocab_size=64, hidden_size=64, num_blocks=1, num_heads=2)),
        "xLSTMForCausalLM has no KV cache",
    ),
    "no linear layer": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)),
        "no linear layer to convert",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_models_are_refused_untouched(kind: str) -> None:
    build, message = UNFIT[kind]
    refused_untouched(build(), "nvfp4", message)


def test_one_server_of_a_pair_is_no_model(plain: PreTrainedModel) -> None:
    with pytest.raises(mixquant.InputError, match="role=prefill is for one server of a pair"):
        mixquant.convert_(plain, {"prefill": "nvfp4", "role": "prefill"})


def test_min_prompt_is_a_rule_for_vllm(plain: PreTrainedModel) -> None:
    with pytest.raises(mixquant.InputError, match="min_prompt=9 is for vLLM's requests: leave it out in Transformers"):
        mixquant.convert_(plain, {"prefill": "nvfp4", "min_prompt": 9})


def test_converting_twice_is_refused(phase: PreTrainedModel) -> None:
    with pytest.raises(mixquant.InputError, match="already converted: load it afresh"):
        mixquant.convert_(phase, "fp8")


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("nvfp5", "did you mean nvfp4"),
        ({"prefil": "nvfp4"}, "did you mean prefill"),
        ({"prefill": "nvfp4", "native": True}, "No native kernel runs nvfp4 on cpu"),
    ],
)
def test_a_policy_that_cannot_be_changes_nothing(handwritten: nn.Module, policy: object, message: str) -> None:
    refused_untouched(handwritten, policy, message)


# What counts as a layer of the decoder.


def test_subclasses_that_compute_the_same_are_converted() -> None:
    """Every linear layer of Falcon is a FalconLinear, whose forward is its own."""
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = seeded(FalconForCausalLM(FalconConfig(**sizes)).double()).eval()
    linears, quantized = linear_names(model) - {"lm_head"}, quantized_copy(model)
    ids = torch.arange(1, 11)[None]
    with torch.no_grad():
        before = model(ids).logits
        assert set(phase_layers(mixquant.convert_(model, {"prefill": "nvfp4", "tail": 0}))) == linears
        assert difference(model(ids).logits, quantized(ids).logits) < EXACT
        assert difference(model(ids).logits, before) > CONTROL


class Doubled(nn.Linear):
    """Computes something else than nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Linear):
    """Needs what a plain nn.Linear does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor  # type: ignore[operator]


@pytest.mark.parametrize("kind", [Doubled, Scaled])
def test_control_subclasses_that_compute_something_else_are_left_alone(
    handwritten: nn.Module, kind: type[nn.Linear]
) -> None:
    handwritten.layers[0].up = kind(32, 64).double()  # type: ignore[index, union-attr]
    assert "layers.0.up" not in phase_layers(mixquant.convert_(handwritten, "nvfp4"))
    assert "layers.1.up" in phase_layers(handwritten)


def test_connectors_and_heads_outside_of_the_decoder_are_left_alone() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text, vision = LlamaConfig(vocab_size=64, **sizes), sizes | {"image_size": 32, "patch_size": 8}
    model = SmolVLMForConditionalGeneration(SmolVLMConfig(text_config=text, vision_config=vision, pad_token_id=0))
    mixquant.convert_(model, "nvfp4")
    assert phase_layers(model)
    assert all(name.startswith("model.text_model.layers.") for name in phase_layers(model))
    bert = BertLMHeadModel(BertConfig(vocab_size=64, **sizes, is_decoder=True)).eval()
    assert phase_layers(mixquant.convert_(bert, "nvfp4"))
    assert not any(name.startswith("cls.") for name in phase_layers(bert))
    assert bert(torch.arange(1, 9)[None]).logits.isfinite().all()


def adapted(model: nn.Module) -> PeftModel:
    """`model` with LoRA on two kinds of layers, its matrices large enough to matter."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(copy.deepcopy(model), config).to(torch.float64)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    return peft.eval()


def test_adapters_stay_precise_in_both_phases(plain: PreTrainedModel, prompts: list[Tensor]) -> None:
    """A prompt reads quantized layers and the adapter as it is, as in vLLM; with `tail=0` all of it is prefill."""
    peft = adapted(plain)
    reader, everything = copy.deepcopy(peft), quantized_copy(peft)
    for name, module in list(reader.named_modules()):
        if type(module) is nn.Linear and "lora_" not in name and not name.endswith("lm_head"):
            parent, _, child = name.rpartition(".")
            setattr(reader.get_submodule(parent), child, FakeQuantLinear(module, "nvfp4"))
    ours = mixquant.convert_(adapted(plain), {"prefill": "nvfp4", "tail": 0})
    assert any(name.endswith("q_proj.base_layer") for name in phase_layers(ours))
    assert not any("lora_" in name for name in phase_layers(ours))
    with torch.no_grad():
        ids = prompts[0][None]
        got = ours(ids).logits.log_softmax(-1)
        assert difference(got, reader(ids).logits.log_softmax(-1)) < EXACT
        for other in (peft, everything):
            assert difference(got, other(ids).logits.log_softmax(-1)) > CONTROL


def test_merging_an_adapter_into_a_converted_model_is_refused(plain: PreTrainedModel) -> None:
    """Its prompt would go on without the adapter."""
    ours = mixquant.convert_(adapted(plain), "nvfp4")
    with pytest.raises(mixquant.InputError, match="weight cannot be written"):
        ours.merge_and_unload()  # type: ignore[operator]


@pytest.mark.parametrize("pattern", ["o_proj", "*.oproj", "model.layers.0"])
def test_a_pattern_that_names_no_layer_is_refused(plain: PreTrainedModel, pattern: str) -> None:
    with pytest.raises(mixquant.InputError, match="No layer is called"):
        mixquant.convert_(copy.deepcopy(plain), {"prefill": "nvfp4", "ignore": [pattern]})


def test_compressed_tensors_patterns_are_understood(plain: PreTrainedModel) -> None:
    model = mixquant.convert_(copy.deepcopy(plain), {"prefill": "nvfp4", "ignore": ["re:.*o_proj"]})
    assert not any("o_proj" in name for name in phase_layers(model))
    assert any("q_proj" in name for name in phase_layers(model))
