"""Prefill weights from folders in Transformers: the folder's numbers read the prompt, and no other model's may.

The reference is a pair of ordinary models in float64: one with the folder's dequantized weights, which reads, and the
plain one, which writes.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mixquant
from mixquant.checkpoint.locate import DEMO, find
from mixquant.checkpoint.sidecar import SIDECAR, DecodeModel, Sidecar, write_sidecar
from mixquant.formats import nvfp4
from mixquant.integrations.transformers.loading import load_model
from mixquant.model.linear import PhaseLinear
from mixquant.policy import TAIL, Policy, arm
from tests.commandline import call
from tests.conftest import PHASE, tiny_qwen3
from tests.folders import LAYOUTS, name_decode_model, write_folded, write_quantized
from tests.integrations.transformers.reference import EXACT, FORMATS, TwoModels, answer, assert_equals, difference

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(plain: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `plain`, in float64."""
    path = tmp_path_factory.mktemp("plain")
    plain.save_pretrained(path)
    return path


@pytest.fixture
def nameless(quantized: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a quantized folder that names no BF16 model."""
    path = shutil.copytree(quantized(), tmp_path / "q")
    (path / SIDECAR).unlink()
    return path


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Quantized folders of `plain`, by the arguments of `write_quantized`, each with its BF16 model named."""
    made: dict[str, Path] = {}

    def write(**arguments: Any) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in made:
            made[key] = write_quantized(folder, tmp_path_factory.mktemp("quantized") / "q", **arguments)
            name_decode_model(made[key], folder, {"prefill": arguments.get("format", "nvfp4"), "tail": 1})
        return made[key]

    return write


def load(folder: Path, *policy: str, **fields: Any) -> PreTrainedModel:
    config = mixquant.MixQuantConfig(*policy, **fields)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float64)


class StoredLinear(nn.Module):
    """A linear layer with a folder's weight, multiplied in float64."""

    def __init__(self, weight: Tensor, activations: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.activations = activations

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.activations(x.flatten(0, -2)), self.weight).view(*x.shape[:-1], -1)


def reader(plain: PreTrainedModel, folder: Path, format: str, activation: float = 4.0) -> PreTrainedModel:
    """`plain` with every weight that `folder` quantizes; the tensors' names are the documented ones of the layouts."""
    tensors = load_file(folder / "model.safetensors")
    model = copy.deepcopy(plain)

    def activations(rows: Tensor) -> Tensor:
        if format != "nvfp4":
            return FORMATS[format][0](rows)
        return nvfp4.quantize_activation(rows, activation).dequantize().double()

    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        stored = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, StoredLinear(dequantized(stored, format), activations))
    return model


def dequantized(stored: dict[str, Tensor], format: str) -> Tensor:
    """float64 [N, K]: compressed-tensors multiplies by its global scale before rounding, ModelOpt divides."""
    if format != "nvfp4":
        return stored["weight"].double() * stored["weight_scale"].double()
    values = nvfp4.unpack(stored["weight_packed"] if "weight_packed" in stored else stored["weight"]).double()
    steps = stored["weight_scale"].double().repeat_interleave(16, dim=1)
    if "weight_scale_2" in stored:
        return values * steps * stored["weight_scale_2"].double()
    return values * steps / stored["weight_global_scale"].double()


def check(model: PreTrainedModel, reference: TwoModels, prompts: list[Tensor]) -> None:
    for prompt, tokens, log_probs in zip(prompts, *answer(model, prompts), strict=True):
        assert_equals(reference, prompt, tokens, log_probs, greedy=False)


@pytest.mark.parametrize(("tool", "format"), LAYOUTS)
def test_folder_beside_the_model(plain, folder, quantized, prompts, tool, format):
    path = quantized(tool=tool, format=format)
    model = load(folder, prefill_weights=path)
    assert model.mixquant_policy == Policy(prefill=format, tail=1)
    check(model, TwoModels(reader(plain, path, format), plain), prompts)


@pytest.mark.parametrize("tool", ["compressed-tensors", "modelopt"])
def test_scales_that_we_would_not_make(plain, folder, quantized, prompts, tool):
    """Globals that are no powers of two, and another one for activations."""
    path = quantized(tool=tool, global_scale=odd_globals, activation=5.0)
    ours = load(folder, prefill_weights=path)
    theirs = TwoModels(reader(plain, path, "nvfp4", 5.0), plain)
    for prompt, tokens, log_probs in zip(prompts, *answer(ours, prompts), strict=True):
        assert difference(log_probs, theirs.score(prompt, tokens)) < 1e-5  # factors on the output are float32
        assert difference(log_probs, TwoModels(reader(plain, path, "nvfp4"), plain).score(prompt, tokens)) > 1e-2


def odd_globals(name: str, amax: Tensor) -> Tensor:
    """compressed-tensors' own rule."""
    return 448 * 6 / amax


@pytest.mark.parametrize("name", ["bf16", "uniform", "phase", "decode-only"])
def test_every_arm_of_a_folder(plain, quantized, prompts, name):
    """The folder as MODEL: each arm's quantized phases run its weights."""
    path = quantized()
    quantizes = reader(plain, path, "nvfp4")
    pairs = {"bf16": (plain, plain), "uniform": (quantizes, quantizes), "phase": (quantizes, plain)}
    reference = TwoModels(*pairs.get(name, (plain, quantizes)))
    model = load_model(find(path), replace(arm(name, "nvfp4"), tail=1), CPU, torch.float64)
    for prompt, tokens, log_probs in zip(prompts, *answer(model, prompts), strict=True):
        assert difference(log_probs, reference.score(prompt, tokens)) < EXACT
        others = [TwoModels(*pair) for other, pair in pairs.items() if other != name]
        assert all(difference(log_probs, other.score(prompt, tokens)) > 1e-2 for other in others)


def test_layers_that_the_folder_left_alone(plain, folder, quantized, prompts):
    path = quantized(ignore=("o_proj",))
    model = load(folder, prefill_weights=path)
    spared = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert spared == {"lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in range(3))}
    check(model, TwoModels(reader(plain, path, "nvfp4"), plain), prompts)


def test_ignore_spares_layers_that_the_folder_has(folder, quantized):
    model = load(folder, prefill_weights=quantized(), ignore=["*.o_proj"])
    assert type(model.model.layers[0].self_attn.o_proj) is nn.Linear
    assert isinstance(model.model.layers[0].self_attn.q_proj, PhaseLinear)


def test_prefixes_of_a_multimodal_checkpoint(plain, folder, quantized, prompts, nameless):
    tensors = load_file(nameless / "model.safetensors")
    renamed = {name.replace("model.layers", "language_model.model.layers"): t for name, t in tensors.items()}
    tower = {name.replace("model.layers", "vision_tower.encoder.layers"): t.clone() for name, t in tensors.items()}
    save_file(renamed | {name: t for name, t in tower.items() if "tower" in name}, nameless / "model.safetensors")
    model = load(folder, PHASE, prefill_weights=nameless)
    check(model, TwoModels(reader(plain, quantized(), "nvfp4"), plain), prompts)


def test_folded_folder(plain, folder, prompts, tmp_path):
    """The folded model answers as the original does, from another KV cache: only it may stand beside the folder."""
    path = write_folded(folder, tmp_path / "q")
    folded = AutoModelForCausalLM.from_pretrained(path / "decode", dtype=torch.float64)
    model = load_model(find(path), PHASE, CPU, torch.float64)
    check(model, TwoModels(reader(folded, path, "nvfp4"), folded), prompts)
    mixed = TwoModels(reader(folded, path, "nvfp4"), plain)
    for prompt, tokens, log_probs in zip(prompts, *answer(folded, prompts), strict=True):
        assert difference(log_probs, TwoModels(plain, plain).score(prompt, tokens)) < EXACT
        assert difference(log_probs, mixed.score(prompt, tokens)) > 1
    with pytest.raises(mixquant.InputError, match=rf"{folder} is not the BF16 model .*: use {path / 'decode'}"):
        load(folder, prefill_weights=path)
    (path / SIDECAR).unlink()
    with pytest.raises(mixquant.InputError, match=r"[vo]_proj: its weight in .* is not a quantized copy"):
        load(folder, prefill_weights=path)


def test_weights_of_another_model(nameless, tmp_path):
    """Without a hash in mixquant.json, the weights themselves tell."""
    other = tiny_qwen3()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.neg_()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(mixquant.InputError, match=r"layers\.1\.mlp\.up_proj: its weight .* is not a quantized copy"):
        load(tmp_path / "other", prefill_weights=nameless)


def test_another_size(nameless, tmp_path):
    tiny_qwen3(intermediate_size=256).save_pretrained(tmp_path / "wide")
    with pytest.raises(mixquant.InputError, match=r"mlp\.\w+_proj: its weight .* is not a quantized copy"):
        load(tmp_path / "wide", prefill_weights=nameless)
    tiny_qwen3(num_hidden_layers=4).save_pretrained(tmp_path / "deep")
    with pytest.raises(mixquant.InputError, match=r"has no layer model\.layers\.3\.self_attn\.q_proj"):
        load(tmp_path / "deep", prefill_weights=nameless)


def test_a_model_without_a_checkpoint(quantized):
    model = tiny_qwen3()
    with pytest.raises(mixquant.InputError, match="Prefill weights need a BF16 model from a checkpoint"):
        type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            quantization_config=mixquant.MixQuantConfig(prefill_weights=quantized()),
        )


def test_formats(folder, quantized, tmp_path):
    with pytest.raises(mixquant.InputError, match="holds nvfp4 and the policy asks for fp8: ask for nvfp4"):
        load(folder, "fp8", prefill_weights=quantized())
    with pytest.raises(mixquant.InputError, match="holds no quantized layer"):
        load(folder, prefill_weights=folder)
    decode_only = load(folder, prefill="bf16", decode="auto", prefill_weights=quantized()).mixquant_policy
    assert (decode_only.prefill, decode_only.decode) == ("bf16", "nvfp4")
    mixed = shutil.copytree(quantized(), tmp_path / "mixed")
    fp8 = load_file(quantized(format="fp8") / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors = {k: v for k, v in load_file(mixed / "model.safetensors").items() if not k.startswith(name)}
    save_file(tensors | {k: v for k, v in fp8.items() if k.startswith(name)}, mixed / "model.safetensors")
    with pytest.raises(mixquant.InputError, match="mixes fp8 and nvfp4: use a folder of one format"):
        load(folder, prefill_weights=mixed)


def test_the_folders_own_policy(folder, quantized, tmp_path):
    path = shutil.copytree(quantized(), tmp_path / "q")
    write_sidecar(path, Sidecar(Policy(prefill="nvfp4", tail=3), DecodeModel("somewhere")))
    assert load(folder, prefill_weights=path).mixquant_policy.tail == 3
    assert load(folder, "nvfp4", prefill_weights=path).mixquant_policy.tail == TAIL


def test_a_config_reads_nothing_and_comes_back_from_its_dictionary(tmp_path):
    for config in (
        mixquant.MixQuantConfig(prefill_weights=tmp_path / "nowhere"),
        mixquant.MixQuantConfig("fp8", prefill_weights="no-such/model"),
        mixquant.MixQuantConfig(prefill="int8", tail=4),
    ):
        assert mixquant.MixQuantConfig.from_dict(config.to_dict()) == config


def test_a_saved_model_would_lose_the_weights(folder, quantized, tmp_path):
    with pytest.raises(mixquant.InputError, match=r"prefill weights are in .*: copy that folder and the BF16 model"):
        load(folder, prefill_weights=quantized()).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_names_no_model(nameless):
    with pytest.raises(mixquant.InputError, match=r"already quantized by compressed-tensors.*prefill_weights="):
        load_model(find(nameless), "nvfp4", CPU)


def test_generating_from_a_folder(tmp_path):
    path = write_quantized(DEMO, tmp_path / "q", scales="amax")
    name_decode_model(path, DEMO, {"prefill": "nvfp4"})
    (tmp_path / "prompt.txt").write_text("How many records are there?")

    def generate(model: str | Path, *options: str) -> dict[str, Any]:
        said = ("--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", "4", "--json")
        return json.loads(call("generate", model, *said, *options).stdout)

    ours = generate(path)
    assert ours["kernels"] == generate("demo", "--prefill", "nvfp4")["kernels"]
    assert ours["policy"]["prefill"] == "nvfp4"
