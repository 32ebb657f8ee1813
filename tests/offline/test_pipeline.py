"""The offline quantizer from outside: what it refuses, and that a run can be killed at any moment."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mixquant
from mixquant.checkpoint.locate import find, locate
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.sidecar import read_sidecar
from mixquant.cli import app
from mixquant.errors import InputError
from mixquant.evaluate.results import Layer
from mixquant.formats import nvfp4, scales
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.integrations.transformers.sensitivity import GroupError
from mixquant.kernels.dense import use_fastest_linear_
from mixquant.offline import gptq as gptq_module
from mixquant.offline import texts
from mixquant.offline.source import Unit
from mixquant.offline.steps import Recipe
from mixquant.policy import Policy
from mixquant.report import divergence
from tests.offline.checkpoints import chats, contents, outlier_model, save, tensors

EVERYTHING = {"fold": True, "gptq": True}
CONTEXT = multiprocessing.get_context("fork")  # starts at once: torch is loaded already


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(outlier_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("text") / "chats.jsonl", 20)


def in_process(work: Callable[[], Any]) -> multiprocessing.Process:
    """Start `work` in a process of its own, which can be killed; its exit code is 2 for an InputError."""

    def run() -> None:
        torch.set_num_threads(1)
        try:
            work()
        except InputError as error:
            print(error)
            os._exit(2)
        os._exit(0)

    process = CONTEXT.Process(target=run)
    process.start()
    return process


# Killed and resumed


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(folder: Path, text: Path, tmp_path: Path) -> None:
    """Until the last rename nothing loads; after it, every byte is that of a run nobody disturbed."""
    output = tmp_path / "out"

    def work() -> None:
        mixquant.quantize(folder, "nvfp4", output=output, calibration=text, **EVERYTHING)

    start = time.perf_counter()
    work()
    whole = time.perf_counter() - start
    undisturbed = contents(output)
    dice, kills, found = random.Random(0), 0, set()
    for _ in range(3):
        shutil.rmtree(output)
        while not output.exists():
            process = in_process(work)
            process.join(dice.uniform(0.02, 0.8) * whole)
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                if output.with_name("out.partial").is_dir():
                    (output.with_name("out.partial") / ".tmpAb1Cd2").write_bytes(b"what a kill leaves of safetensors")
            assert process.exitcode in (0, -signal.SIGKILL)
            assert output.exists() or not fools_loaders(output.with_name("out.partial"))
            found.add(len(list(tmp_path.rglob("*.safetensors"))))
        assert contents(output) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert kills >= 6
    assert len(found) >= 3, "the kills all came at one moment"


def fools_loaders(folder: Path) -> bool:
    """Whether loaders would take the folder for a checkpoint, and a shard is missing."""
    try:
        locate(str(folder))
    except InputError:
        return False
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return not set(index["weight_map"].values()) <= {file.name for file in folder.iterdir()}


def test_killed_between_the_renames_of_an_overwrite(folder: Path, tmp_path: Path) -> None:
    """Both checkpoints then stand in DIR.partial, and the next run puts the new one in its place."""
    output = tmp_path / "out"
    mixquant.quantize(folder, "nvfp4", output=output, calibration=None)
    expected = contents(output)
    output.rename(tmp_path / "out.partial")
    shutil.copytree(tmp_path / "out.partial", tmp_path / "out.partial" / "replaced")
    mixquant.quantize(folder, "nvfp4", output=output, calibration=None, overwrite=True)
    assert contents(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_only_what_mixquant_wrote_is_touched(folder: Path, tmp_path: Path, overwrite: bool) -> None:
    """Neighbours with telling names, and strange files in an unfinished run of ours, which never count as shards."""
    output = tmp_path / "out"
    for name in ("out.old", "out.model-1"):
        shutil.copytree(folder, tmp_path / name)
    if overwrite:
        mixquant.quantize(folder, "fp8", output=output)
    work = lambda: mixquant.quantize(  # noqa: E731
        folder, output=output, calibration=None, overwrite=overwrite, progress=stop_after_two
    )
    in_process(work).join()
    save_file({"model.stranger.weight": torch.ones(3)}, tmp_path / "out.partial" / "model-strange.safetensors")
    before = {name: contents(tmp_path / name) for name in ("out.old", "out.model-1")}
    result = mixquant.quantize(folder, output=output, calibration=None, overwrite=overwrite)
    assert {name: contents(tmp_path / name) for name in before} == before
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert "model.stranger.weight" not in index["weight_map"]
    assert (output / "model-strange.safetensors").is_file()
    clean = mixquant.quantize(folder, output=tmp_path / "clean", calibration=None)
    assert result.prefill_bytes == clean.prefill_bytes
    assert index == json.loads((tmp_path / "clean" / "model.safetensors.index.json").read_text())


def test_a_partial_folder_of_somebody_else(folder: Path, tmp_path: Path) -> None:
    """Refused before any work, with everything in it."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.tmp").write_text("mine")
    with pytest.raises(InputError, match=r"out.partial was not written by mixquant, which needs the name: move it"):
        mixquant.quantize("no/such/model", output=tmp_path / "out")
    assert contents(tmp_path) == {"out.partial/notes.tmp": b"mine"}
    (tmp_path / "out.partial" / "notes.tmp").unlink()
    mixquant.quantize(folder, output=tmp_path / "out", calibration=None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_folder_that_holds_the_model_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model" / "inner")
    mixquant.quantize(folder, "fp8", output=tmp_path / "out")
    shutil.move(tmp_path / "model" / "inner", tmp_path / "out" / "inner")
    for model, output in ((tmp_path / "out" / "inner", tmp_path / "out"), (folder, folder.parent / "..")):
        before = contents(tmp_path)
        with pytest.raises(InputError, match=r"holds the model itself|is no name for a folder"):
            mixquant.quantize(model, output=output, calibration=None, overwrite=True)
        assert contents(tmp_path) == before


def test_a_finished_layer_is_not_computed_again(folder: Path, tmp_path: Path) -> None:
    def work() -> None:
        mixquant.quantize(folder, "nvfp4", output=tmp_path / "out", calibration=None, progress=stop_after_two)

    process = in_process(work)
    process.join()
    assert process.exitcode == 1
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(shards) == 2
    mixquant.quantize(folder, "nvfp4", output=tmp_path / "out", calibration=None)
    assert all((tmp_path / "out" / file.name).stat().st_mtime_ns == then for file, then in shards.items())


def stop_after_two(units: Any) -> Any:
    yield from units[:2]
    os._exit(1)


def test_an_unfinished_run_of_another_recipe_is_left_alone(folder: Path, text: Path, tmp_path: Path) -> None:
    work = lambda: mixquant.quantize(folder, output=tmp_path / "out", calibration=text, progress=stop_after_two)  # noqa: E731
    in_process(work).join()
    before = contents(tmp_path)
    for change in (
        {"calibration": None},
        {"calibration": text, "gptq": False},
        {"policy": "int8", "calibration": None},
    ):
        with pytest.raises(InputError, match=r"out.partial is of an unfinished run with another recipe \("):
            mixquant.quantize(folder, output=tmp_path / "out", **change)
    assert contents(tmp_path) == before


def test_two_runs_at_once(folder: Path, tmp_path: Path) -> None:
    process = in_process(
        lambda: mixquant.quantize(folder, output=tmp_path / "out", calibration=None, progress=lambda u: time.sleep(60))
    )
    while not (tmp_path / "out.partial" / "mixquant.json").is_file():
        time.sleep(0.01)
    time.sleep(0.05)
    with pytest.raises(InputError, match=r"Another run is writing .*out.partial"):
        mixquant.quantize(folder, output=tmp_path / "out", calibration=None)
    process.kill()
    process.join()
    mixquant.quantize(folder, output=tmp_path / "out", calibration=None)


def test_a_full_disk_is_one_sentence_and_costs_nothing(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Here the limit is the process's own; the system answers the same way, in the middle of a file."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        mixquant.quantize(folder, "nvfp4", output=tmp_path / "out", calibration=None)

    process = in_process(work)
    process.join()
    assert process.exitcode == 2
    assert "make room or choose another place, and run the same command again" in capfd.readouterr().out
    kept = list((tmp_path / "out.partial").glob("*.safetensors"))
    assert len(kept) == 3  # the decoder's layers; the embedding was too large
    mixquant.quantize(folder, "nvfp4", output=tmp_path / "out", calibration=None)
    load_model(find(tmp_path / "out"), "nvfp4", torch.device("cpu"))


@pytest.mark.parametrize("budget", [None, 0.4])
def test_a_model_in_memory_is_killed_and_resumed(tmp_path: Path, budget: float | None) -> None:
    """The copy that a kill leaves goes with the next run; layers are not measured again."""
    model = outlier_model(num_hidden_layers=1, max_position_embeddings=4096)
    model.name_or_path = str(save(model, tmp_path / "model"))
    output = tmp_path / "out"
    work = lambda **options: mixquant.quantize(model, output=output, calibration=None, budget=budget, **options)  # noqa: E731
    in_process(lambda: work(progress=stop_after_first_shard)).join()
    partial = output.with_name("out.partial")
    assert (partial / "source").is_dir()
    assert len(list(partial.glob("*.safetensors"))) == 1
    steps: list[Any] = []
    work(progress=lambda found: steps.append(list(found)) or found)
    assert len(steps) == 1, "only the units"
    resumed = contents(output)
    shutil.rmtree(output)
    work()
    assert contents(output) == resumed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def stop_after_first_shard(steps: Any) -> Any:
    if not isinstance(steps[0], Unit):
        return steps
    return stop_after(steps[:1])


def stop_after(steps: Any) -> Any:
    yield from steps
    os._exit(1)


def test_a_disk_too_full_for_the_copy_of_a_model_in_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = outlier_model()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        mixquant.quantize(model, "nvfp4", output=tmp_path / "deep" / "out", calibration=None)

    process = in_process(work)
    process.join()
    assert process.exitcode == 2
    assert "cannot be written" in (said := capfd.readouterr().out)
    assert "layers are kept" not in said
    assert list(tmp_path.iterdir()) == []


# Output


def test_an_output_that_exists(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    mixquant.quantize(folder, "nvfp4", output=output, calibration=None)
    before = contents(output)
    with pytest.raises(InputError, match=r"out exists: name another folder, or replace it with --overwrite"):
        mixquant.quantize(folder, "fp8", output=output)
    assert contents(output) == before
    mixquant.quantize(folder, "fp8", output=output, overwrite=True)
    assert read_sidecar(output).policy.prefill == "fp8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_spares_what_mixquant_did_not_write(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    with pytest.raises(InputError, match=r"thesis was not written by `mixquant quantize`"):
        mixquant.quantize(folder, "fp8", output=tmp_path / "thesis", overwrite=True)


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
        ({"policy": "int8", "calibration": "nofile.txt"}, r"nofile.txt is not a file: name a text or JSONL file"),
        ({"budget": "x"}, r"share of the weights above 0 and below 1, such as 0.1, not 'x'"),
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
def test_unfit_recipes(folder: Path, tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
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
    read = texts.read(str(text), load_tokenizer(find(folder)), 512, 65_536)
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
    """`--ignore auto`: of one layer's four groups, at most 40 % of the weights; both phases are measured."""
    model = save(outlier_model(num_hidden_layers=1, max_position_embeddings=4096), tmp_path / "model")
    result = mixquant.quantize(model, "nvfp4", output=tmp_path / "out", calibration=None, budget=0.4)
    ignored = read_sidecar(tmp_path / "out").policy.ignore
    by_layer = json.loads((tmp_path / "out" / "sensitivity.json").read_text())["by_layer"]
    rows = by_layer["phase"]
    spared = [row for row in rows if row["members"][0] in ignored]
    assert 0 < sum(row["parameters"] for row in spared) <= 0.4 * sum(row["parameters"] for row in rows)
    worst = max(rows, key=lambda row: row["kld_mean"] / row["parameters"])
    assert worst in spared
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


def test_a_budget_without_auto(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["quantize", str(folder), "-o", str(tmp_path / "out"), "--budget", "0.2"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception) == "--budget is of --ignore auto: add that, or leave the budget out."
    assert list(tmp_path.iterdir()) == []


def test_layers_unfit_for_nvfp4_do_not_stand_in_the_way_of_auto(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": 4096, "intermediate_size": 72}
    model = save(outlier_model(**sizes), tmp_path / "model")
    result = mixquant.quantize(model, "nvfp4", output=tmp_path / "out", calibration=None, budget=0.4)
    assert result.notes[0].startswith("model.layers.0.mlp.down_proj stays BF16")
    assert "down_proj" not in {group.name.rpartition(".")[2] for group in result.sensitivity["phase"]}
