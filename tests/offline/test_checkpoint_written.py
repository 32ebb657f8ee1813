"""What the offline quantizer writes: plain compressed-tensors, and two sides that agree on the KV cache."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

import mixquant
from mixquant.checkpoint.locate import find
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.sidecar import fingerprint, read_sidecar
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.model.linear import PhaseLinear
from mixquant.offline import calibration_text
from mixquant.offline.folder import quantization_config
from mixquant.policy import Policy
from tests.commandline import call
from tests.offline.checkpoints import chats, contents, tensors
from tests.offline.models import tiny

CPU = torch.device("cpu")
RECIPES = {
    "plain": ("nvfp4", {"gptq": False}),
    "full": ("nvfp4", {"fold": True, "gptq": True}),
    "fp8": ("fp8", {"fold": True}),
    "int8": ("int8", {}),
}
FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for several sequences."""
    return chats(tmp_path_factory.mktemp("text") / "chats.jsonl", 60)


@pytest.fixture(scope="module")
def written(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each recipe."""
    paths = {name: tmp_path_factory.mktemp("written") / name for name in RECIPES}
    for name, (policy, options) in RECIPES.items():
        calibration = "agents" if name == "int8" else text  # which needs none, and refuses a file
        mixquant.quantize(folder, policy, output=paths[name], calibration=calibration, **options)
    return paths


def plain_model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_and_compressed_tensors_read_the_same_weights(recipe: str, folder: Path, written) -> None:
    """Bit for bit, by stock Transformers with compressed-tensors' own decompressor, which knows nothing of us.

    In float32: in BF16 it would round the row scales of FP8 and INT8 to BF16.
    """
    config = CompressedTensorsConfig(run_compressed=False)
    stock = AutoModelForCausalLM.from_pretrained(written[recipe], quantization_config=config, dtype=torch.float32)
    ours, original = QuantizedFolder(written[recipe]), plain_model(folder)
    quantized = [layer for layer in ours.layers() if ours.format(layer) != "bf16"]
    assert len(quantized) == 3 * 7
    for layer in quantized:
        weight = stock.get_submodule(layer).weight
        assert torch.equal(weight, ours.read(layer).weight.dequantize())
        assert not torch.equal(weight, original.get_submodule(layer).weight.float())


@pytest.mark.parametrize("recipe", ["plain", "full"])
def test_fused_layers_share_their_globals(recipe: str, written) -> None:
    stored = tensors(written[recipe])
    for index in range(3):
        parent = f"model.layers.{index}"
        for module, names in zip(("self_attn", "mlp"), FUSED, strict=True):
            for scale in ("weight_global_scale", "input_global_scale"):
                values = [stored[f"{parent}.{module}.{name}.{scale}"] for name in names]
                assert all(value.shape == (1,) and value == values[0] for value in values)
    inputs = {float(value) for name, value in stored.items() if name.endswith("input_global_scale")}
    assert len(inputs) > 1, "calibration found all inputs alike"


def test_inputs_have_sixteenfold_headroom(folder: Path, text: Path, written) -> None:
    """The largest power of two that keeps sixteen times the calibration's maximum in range; held-out rows are out."""
    model, stored = plain_model(folder), tensors(written["plain"])
    seen: dict[str, float] = {}
    counts: list[int] = []
    names = [name.removesuffix(".input_global_scale") for name in stored if name.endswith(".input_global_scale")]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.update(
                {name: max(seen.get(name, 0), float(args[0].detach()[0, : counts[-1]].abs().max()))}
            )
        )
    read = calibration_text.read(str(text), load_tokenizer(find(folder)), 512, 65_536)
    for ids, count in zip(read.sequences, read.counted, strict=True):
        counts.append(count)
        if count:
            model(ids, use_cache=False)
    assert len(read.sequences) > 1
    for name in names:
        highest = 448 * 6 / float(stored[f"{name}.input_global_scale"])
        assert highest / 2 < 16 * seen[name] <= highest


def test_folding_changes_no_answer_of_the_bf16_model(folder: Path, written) -> None:
    original, folded = plain_model(folder), plain_model(written["full"] / "decode")
    ids = torch.randint(1, 512, (1, 50), generator=torch.Generator().manual_seed(5))
    assert torch.equal(original(ids).logits, folded(ids).logits)
    changed = {
        name.split(".", 3)[-1]
        for (name, one), other in zip(original.named_parameters(), folded.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert {"input_layernorm.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"} <= changed
    norm = "model.layers.1.input_layernorm.weight"
    assert torch.equal(tensors(written["full"])[norm], tensors(written["full"] / "decode")[norm])


@torch.no_grad()
def cached(model: PreTrainedModel, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer after a prompt."""
    return [(layer.keys.float(), layer.values.float()) for layer in model(ids, use_cache=True).past_key_values.layers]


def far(found: Tensor, expected: Tensor) -> float:
    """Relative squared difference."""
    return float((found - expected).square().sum() / expected.square().sum())


def test_both_sides_agree_on_the_kv_cache(folder: Path, written) -> None:
    """What the quantized side writes is what the named BF16 model reads, up to quantization; the original's is not."""
    prefill = load_model(find(written["full"]), Policy(prefill="nvfp4", tail=0), CPU)
    named, original = plain_model(written["full"] / "decode"), plain_model(folder)
    ids = torch.randint(1, 512, (1, 50), generator=torch.Generator().manual_seed(5))
    caches = [cached(model, ids) for model in (prefill, named, original)]
    rows = zip(*caches, strict=True)
    for bound, ((keys, values), (named_keys, named_values), (_, original_values)) in zip(
        (0.03, 0.3, 0.6), rows, strict=True
    ):  # the errors of earlier layers come on top
        assert 1e-4 < far(keys, named_keys) < bound
        assert 1e-4 < far(values, named_values) < bound
        assert far(values, original_values) > 0.2 + far(values, named_values)


def test_the_sidecar_names_the_right_bf16_model(folder: Path, written) -> None:
    for recipe, decode in (("plain", folder), ("full", written["full"] / "decode")):
        named = read_sidecar(written[recipe]).decode_model
        assert Path(named.located(written[recipe]).model) == decode
        assert named.hash == fingerprint(decode)
    assert fingerprint(folder) != fingerprint(written["full"] / "decode")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_folder_is_complete(recipe: str, folder: Path, written) -> None:
    for path in [written[recipe], *written[recipe].glob("decode")]:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        stored = tensors(path)
        assert set(index["weight_map"]) == set(stored)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
        assert {file.stat().st_mode & 0o777 for file in path.glob("*.safetensors")} == {0o644}
        assert load_tokenizer(find(path)).chat_template == load_tokenizer(find(folder)).chat_template
    assert (written[recipe] / "decode").is_dir() == ("fold" in RECIPES[recipe][1])


@pytest.mark.parametrize("recipe", ["plain", "full", "int8"])
def test_the_card_says_how_to_repeat_it(
    recipe: str, text: Path, written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command on the model card gives the folder again, byte for byte."""
    card = (written[recipe] / "README.md").read_text()
    (command,) = re.findall(r"^mixquant (quantize .*)$", card, re.MULTILINE)
    shutil.copy(text, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "SQNR" in call(*shlex.split(command)).stdout
    assert contents(tmp_path / recipe) == contents(written[recipe])


def test_the_card_says_how_to_run_it(written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(written["full"].parent)
    (snippet,) = re.findall(r"```python\n(.*?)```", (written["full"] / "README.md").read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    exec(snippet, namespace)
    model = namespace["model"]
    ids = torch.randint(1, 512, (1, 50), generator=torch.Generator().manual_seed(5))
    expected = load_model(find(written["full"]), "nvfp4", CPU)(ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(plain_model(written["full"] / "decode")(ids).logits, expected)


def test_the_card_of_the_demo_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no folder and no hub id; plain amax of one layer, to be quick."""
    others = [f"model.layers.{index}.*" for index in range(1, 8)]
    policy = {"prefill": "nvfp4", "scales": "amax", "ignore": others}
    mixquant.quantize("demo", policy, output=tmp_path / "out", calibration=None)
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    namespace: dict[str, object] = {}
    exec(snippet, namespace)
    kinds = {name: type(module) for name, module in namespace["model"].named_modules() if name.endswith("up_proj")}
    assert [name for name, kind in kinds.items() if kind is PhaseLinear] == ["model.layers.0.mlp.up_proj"]


PRESETS = {"nvfp4": "NVFP4", "fp8": "FP8_DYNAMIC", "int8": "INT8"}


@pytest.mark.parametrize("format", PRESETS)
def test_the_configuration_is_a_preset_of_compressed_tensors(format: str) -> None:
    """As the installed package reads it; and it is the preset of no other format."""
    config = QuantizationConfig.model_validate(quantization_config(format, ["lm_head"]))
    found = config.config_groups["group_0"]
    named = {ours: preset_name_to_scheme(theirs, ["Linear"]) for ours, theirs in PRESETS.items()}
    alike = [
        ours
        for ours, scheme in named.items()
        if (scheme.weights, scheme.input_activations) == (found.weights, found.input_activations)
    ]
    assert alike == [format]
    assert (config.ignore, found.format) == (["lm_head"], config.format)


def test_a_card_tells_the_formats_apart(written) -> None:
    cards = {recipe: (path / "README.md").read_text() for recipe, path in written.items()}
    assert "| largest magnitudes, shared globals |" in cards["plain"]
    assert "| largest magnitudes |" in cards["int8"]


def test_experts_stay_as_they_are_and_the_card_says_so(tmp_path: Path) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "max_position_embeddings": 512}
    model = tiny("qwen3_moe", **sizes)
    model.save_pretrained(tmp_path / "moe")
    result = mixquant.quantize(tmp_path / "moe", "nvfp4", output=tmp_path / "out", calibration=None)
    assert re.match(r"\d\d% of the parameters are experts, which stay BF16", result.notes[0])
    assert f"- {result.notes[0]}" in (tmp_path / "out" / "README.md").read_text()
    before, after = tensors(tmp_path / "moe"), tensors(tmp_path / "out")
    experts = [name for name in before if ".experts." in name]
    assert experts
    assert all(torch.equal(before[name], after[name]) for name in experts)
