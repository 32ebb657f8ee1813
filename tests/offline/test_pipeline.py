"""The offline quantizer from outside: what it refuses, what each step gains, and which layers it leaves alone."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mixquant
from mixquant.checkpoint.locate import find
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.sidecar import read_sidecar
from mixquant.errors import InputError
from mixquant.evaluate.results import Layer
from mixquant.formats import nvfp4, scales
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.integrations.transformers.sensitivity import GroupError
from mixquant.kernels.dense import use_fastest_linear_
from mixquant.offline import calibration_text
from mixquant.offline import gptq as gptq_module
from mixquant.offline.recipe import Recipe
from mixquant.policy import Policy
from mixquant.report import divergence
from tests.offline.checkpoints import outlier_model, save, tensors

EVERYTHING = {"fold": True, "gptq": True}


# Input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"policy": "bf16"}, r"not prefill=bf16 with decode=bf16: use nvfp4, fp8, int8"),
        ({"policy": "auto"}, r"not prefill=auto"),
        ({"policy": "uniform-fp8"}, r"not prefill=fp8 with decode=fp8"),
        ({"policy": "int8", "gptq": True}, r"GPTQ rounds to the NVFP4 grid, not to int8"),
        ({"fold": True, "calibration": None}, r"Folding and GPTQ need calibration text"),
        ({"gptq": True, "calibration": None}, r"Folding and GPTQ need calibration text"),
        ({"calibration": "nofile.txt"}, r"nofile.txt is not a file: name a text or JSONL file"),
        ({"policy": "int8", "calibration": "a.txt"}, r"int8 scales each token .* folding only: leave the file out"),
        ({"policy": "fp8", "calibration": "a.txt"}, r"fp8 scales each token .* folding only: leave the file out"),
        ({"ignore_worst": "x"}, r"share of the weights above 0 and below 1, such as 0.1, not 'x'"),
        ({"policy": {"prefill": "nvfp4", "ignore": ["*.k_porj"]}}, r"No layer is called .*did you mean '\*.k_proj'"),
        (
            {"policy": {"prefill": "nvfp4", "ignore": ["model.layers.9.mlp.up_proj"]}},
            r"did you mean 'model.layers.\d.m",
        ),
        ({"policy": {"prefill": "nvfp4", "ignore": ["*"]}}, r"has no linear layer to quantize: see `ignore`"),
        ({"policy": {"prefill": "nvfp4", "ignore": ["*.k_proj"]}}, r"engines fuse them: ignore both or none"),
        ({"device": "cuda:7"}, r"There is no CUDA device 7 here"),
    ],
)
def test_unsupported_recipes(folder: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        mixquant.quantize(folder, output=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_already_quantized_model(folder: Path, tmp_path: Path) -> None:
    mixquant.quantize(folder, "nvfp4", output=tmp_path / "once", calibration=None)
    with pytest.raises(InputError, match=r"is already quantized by compressed-tensors: quantize its BF16 model, "):
        mixquant.quantize(tmp_path / "once", "nvfp4", output=tmp_path / "twice")


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("model.layers.1.mlp.up_proj.weight", lambda t: t.fill_(torch.nan), r"1.mlp.up_proj.weight holds \d+ NaN"),
        ("model.layers.1.self_attn.k_proj.weight", lambda t: t.fill_(torch.inf), r"1.self_attn.k_proj.weight holds"),
        ("model.layers.1.mlp.up_proj.weight", lambda t: t[:5].clone(), r"has shape \[5, 64\] and config.json says"),
        (
            "model.layers.1.mlp.up_proj.weight",
            lambda t: t.to(torch.float8_e4m3fn),
            r"holds F8_E4M3 codes: it is quantized",
        ),
        ("model.layers.1.mlp.up_proj.weight", None, r"has no model.layers.1.mlp.up_proj.weight: use a complete"),
    ],
)
def test_damaged_weights(folder: Path, tmp_path: Path, name: str, damage: Any, sentence: str) -> None:
    shutil.copytree(folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    tensor = weights.pop(name)
    save_file(weights | ({name: damage(tensor)} if damage else {}), tmp_path / "model" / "model.safetensors")
    for output, calibration in (("out", None), ("calibrated", "agents")):
        with pytest.raises(InputError, match=sentence):
            mixquant.quantize(tmp_path / "model", "nvfp4", output=tmp_path / output, calibration=calibration)
        assert not (tmp_path / output).exists()


def test_a_layer_whose_k_is_no_multiple_of_16_stays_as_it_is(tmp_path: Path) -> None:
    model = save(outlier_model(intermediate_size=72), tmp_path / "model")
    result = mixquant.quantize(model, "nvfp4", output=tmp_path / "out", calibration=None)
    assert result.notes[0] == "model.layers.0.mlp.down_proj stays BF16: its K of 72 is no multiple of 16."
    assert len(result.notes) == 3
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(tensors(tmp_path / "out")[name], tensors(model)[name])
    assert (
        "model.layers.0.mlp.down_proj"
        in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    )
    load_model(find(tmp_path / "out"), "nvfp4", torch.device("cpu"))


def test_shards_in_give_what_one_file_gives(folder: Path, text: Path, tmp_path: Path) -> None:
    sharded = save(outlier_model(), tmp_path / "sharded", shard="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    for name, model in (("one", folder), ("many", sharded)):
        mixquant.quantize(model, "nvfp4", output=tmp_path / name, calibration=text, fold=True, gptq=False)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name].view(torch.uint8), many[name].view(torch.uint8)) for name in one)


def test_a_model_in_memory_brings_its_weights_along(folder: Path, tmp_path: Path) -> None:
    model = load_model(find(folder), "nvfp4", torch.device("cpu"))
    model.model.norm.weight.data.mul_(2)  # no longer what is on the disk
    mixquant.quantize(model, "nvfp4", output=tmp_path / "out", calibration=None)
    sidecar = read_sidecar(tmp_path / "out")
    assert sidecar.decode_model.model == "decode"
    assert sidecar.recipe["base_model"]["model"] == str(folder)
    assert torch.equal(tensors(tmp_path / "out" / "decode")["model.norm.weight"], model.model.norm.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(InputError, match="is not the BF16 model that the quantized weights belong to"):
        sidecar.decode_model.check(folder)


# Gains


@pytest.mark.parametrize(
    ("policy", "steps"), [("nvfp4", ["amax", "fold", "search", "gptq"]), ("int8", ["amax", "fold"])]
)
def test_each_step_is_measured(folder: Path, text: Path, tmp_path: Path, policy: str, steps: list[str]) -> None:
    options = EVERYTHING if policy == "nvfp4" else {"fold": True}
    result = mixquant.quantize(folder, policy, output=tmp_path / "out", calibration=text, **options)
    assert list(result.errors) == steps
    assert all(0 < error < 0.1 for error in result.errors.values())
    assert result.errors["fold"] < result.errors["amax"]  # the model was made for it
    layers = json.loads((tmp_path / "out" / "errors.json").read_text())
    assert result.errors["fold"] == pytest.approx(sum(layer["fold"] for layer in layers.values()) / len(layers))
    assert read_sidecar(tmp_path / "out").recipe["errors"]["mean"] == result.errors
    assert f"{result.errors['fold']:.3e}" in (tmp_path / "out" / "README.md").read_text()


def test_searching_helps_and_amax_leaves_it_out(folder: Path, tmp_path: Path) -> None:
    searched = mixquant.quantize(folder, "nvfp4", output=tmp_path / "a", calibration=None).errors
    plain = Policy(prefill="nvfp4", scales="amax")
    assert mixquant.quantize(folder, plain, output=tmp_path / "b", calibration=None).errors == {
        "amax": searched["amax"]
    }
    assert searched["search"] < 0.8 * searched["amax"]


@pytest.mark.parametrize(
    ("policy", "options", "steps"),
    [
        ("nvfp4", {}, ["amax", "search", "gptq"]),
        ("nvfp4", {"gptq": False}, ["amax", "search"]),
        ({"prefill": "nvfp4", "scales": "amax"}, {}, ["amax"]),
        ({"prefill": "nvfp4", "scales": "amax"}, {"gptq": True}, ["amax", "gptq"]),
        ("nvfp4", {"calibration": None}, ["amax", "search"]),
        ("fp8", {}, ["amax"]),
    ],
)
def test_gptq_is_the_default_where_it_applies(policy: Any, options: dict[str, Any], steps: list[str]) -> None:
    recipe = Recipe(policy=Policy.parse(policy), **{"calibration": "agents"} | options)
    assert recipe.steps == steps
    assert recipe.gptq == ("gptq" in steps)


@pytest.mark.parametrize("gptq", [False, True])
def test_weights_are_those_of_the_rules_on_the_calibration_text(
    folder: Path, text: Path, tmp_path: Path, gptq: bool
) -> None:
    """E[x^2] and E[x x^T] of the text that counts, from the whole model; each layer's weights made by hand of them."""
    mixquant.quantize(folder, "nvfp4", output=tmp_path / "out", calibration=text, gptq=gptq)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    read = calibration_text.read(str(text), load_tokenizer(find(folder)), 512, 65_536)
    stored = QuantizedFolder(tmp_path / "out")
    rows: dict[str, list[torch.Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows.setdefault(name, []).append(args[0].detach().flatten(0, -2).float())
        )
        for name in (layer for layer in stored.layers() if stored.format(layer) == "nvfp4")
    ]
    use_fastest_linear_(model, torch.device("cpu"))
    with torch.no_grad():
        for ids in read.sequences:
            model(ids, use_cache=False)
    assert len(hooks) == len(rows) == 3 * 7
    for name, seen in rows.items():
        x, weight = torch.cat(seen)[: -read.held_out], model.get_submodule(name).weight.detach()
        found = stored.read(name).weight
        moment = (x.T @ x) / len(x)
        searched = functools.partial(scales.search, importance=x.double().square().mean(0).float())
        by_search = nvfp4.quantize(weight, found.global_scale, searched)
        by_gptq = gptq_module.quantize(weight, gptq_module.factor_(moment, len(x)), found.global_scale)
        expected, other = (by_gptq, by_search) if gptq else (by_search, by_gptq)
        assert same(found, expected) > 0.99, name
        assert same(found, other) < 0.9
        plain = nvfp4.quantize(weight, found.global_scale, scales.search)
        assert same(found, plain) < 0.95, "calibration has no effect"


def same(one: nvfp4.NVFP4Tensor, other: nvfp4.NVFP4Tensor) -> float:
    """Share of equal values."""
    return float((one.dequantize() == other.dequantize()).double().mean())


def test_layers_that_hurt_most_stay_precise(tmp_path: Path) -> None:
    """`--ignore-worst`: of one layer's four groups, at most 40 % of the weights; both phases are measured."""
    model = save(outlier_model(num_hidden_layers=1, max_position_embeddings=4096), tmp_path / "model")
    result = mixquant.quantize(model, "nvfp4", output=tmp_path / "out", calibration=None, ignore_worst=0.4)
    ignored = read_sidecar(tmp_path / "out").policy.ignore
    by_layer = json.loads((tmp_path / "out" / "sensitivity.json").read_text())["by_layer"]
    rows = by_layer["phase"]
    kept = [row for row in rows if row["members"][0] in ignored]
    assert 0 < sum(row["parameters"] for row in kept) <= 0.4 * sum(row["parameters"] for row in rows)
    worst = max(rows, key=lambda row: row["kld_mean"] / row["parameters"])
    assert worst in kept
    assert set(ignored) <= {name.removesuffix(".weight") for name in tensors(tmp_path / "out")}
    assert [row["layer"] for row in by_layer["decode-only"]] == [row["layer"] for row in rows]
    assert all(5 < row["sqnr_db"] < 40 for arm in by_layer.values() for row in arm)
    assert all(row["kld_mean"] > 0 for row in by_layer["decode-only"])
    reaches = [row["kld_mean"] > 0 for row in rows]
    assert reaches == [True, False, False, False], "of the last layer's prompt, the answer sees keys and values only"
    section = divergence.layers({arm: [Layer(**row) for row in found] for arm, found in by_layer.items()})
    assert {row.arm for row in section.blocks[1].rows} == {"phase", "decode-only"}
    assert [GroupError.from_dict(row).to_dict() for row in rows] == rows
    assert list(result.sensitivity) == ["phase", "decode-only"]


def test_layers_that_nvfp4_cannot_hold_are_not_measured(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 4096, "intermediate_size": 72}
    model = save(outlier_model(**sizes), tmp_path / "model")
    result = mixquant.quantize(model, "nvfp4", output=tmp_path / "out", calibration=None, ignore_worst=0.4)
    assert result.notes[0].startswith("model.layers.0.mlp.down_proj stays BF16")
    assert "down_proj" not in {group.name.rpartition(".")[2] for group in result.sensitivity["phase"]}
