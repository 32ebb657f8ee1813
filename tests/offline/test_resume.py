"""The offline quantizer's folder: a run can be killed at any moment, and touches nothing that is not its own."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import mixquant
from mixquant.checkpoint.locate import find
from mixquant.checkpoint.sidecar import read_sidecar
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import load_model
from tests.offline.checkpoints import contents, outlier_model, save
from tests.offline.processes import (
    CONTEXT,
    exit_code,
    in_process,
    killed_before_write,
    stop_after_first_shard,
    stop_after_two,
)  # fmt: skip


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(folder: Path, text: Path, tmp_path: Path) -> None:
    """Killed before its first write, then before its second, and so on: each run goes on where the last one died.

    Until the last rename nothing loads; after it, every byte is that of a run nobody disturbed.
    """
    output, partial = tmp_path / "out", tmp_path / "out.partial"

    def work() -> None:
        mixquant.quantize(folder, "nvfp4", output=output, calibration=text, fold=True, gptq=True)

    work()
    undisturbed = contents(output)
    shutil.rmtree(output)
    kills, found = 0, set()
    while not output.exists():
        kills += killed_before_write(kills + 1, tmp_path, work)
        assert output.exists() or not fools_loaders(partial)
        if (partial / "mixquant.json").is_file():
            (partial / ".tmpAb1Cd2").write_bytes(b"what a kill leaves of safetensors")
        found.add(len(list(tmp_path.rglob("*.safetensors"))))
    assert contents(output) == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert found >= {0, 1, 2, 8}, "shards of four units, each with a folded BF16 one"
    assert kills > 20


def fools_loaders(folder: Path) -> bool:
    """Whether loaders would take the folder for a checkpoint, and one of its four shards is missing."""
    try:
        find(folder)
    except InputError:
        return False
    return len(list(folder.glob("*.safetensors"))) < 4


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
    assert exit_code(work) == 1
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

    assert exit_code(work) == 1
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "out.partial").glob("*.safetensors")}
    assert len(shards) == 2
    mixquant.quantize(folder, "nvfp4", output=tmp_path / "out", calibration=None)
    assert all((tmp_path / "out" / file.name).stat().st_mtime_ns == then for file, then in shards.items())


def test_an_unfinished_run_of_another_recipe_is_left_alone(folder: Path, text: Path, tmp_path: Path) -> None:
    work = lambda: mixquant.quantize(folder, output=tmp_path / "out", calibration=text, progress=stop_after_two)  # noqa: E731
    assert exit_code(work) == 1
    (tmp_path / "out.partial" / "run.lock").unlink()  # which goes with the next run, whatever becomes of it
    before = contents(tmp_path)
    for change in (
        {"calibration": None},
        {"calibration": text, "gptq": False},
        {"calibration": text, "ignore_worst": 0.1},
        {"calibration": text, "policy": {"prefill": "nvfp4", "ignore": ["*.down_proj"]}},
        {"policy": "int8", "calibration": None},
    ):
        with pytest.raises(InputError, match=r"out.partial is of an unfinished run with another recipe \("):
            mixquant.quantize(folder, output=tmp_path / "out", **change)
    assert contents(tmp_path) == before


def test_two_runs_at_once(folder: Path, tmp_path: Path) -> None:
    begun, ended = CONTEXT.Event(), CONTEXT.Event()

    def wait(units: Any) -> Any:
        begun.set()
        ended.wait()
        return units

    process = in_process(lambda: mixquant.quantize(folder, output=tmp_path / "out", calibration=None, progress=wait))
    begun.wait()
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

    assert exit_code(work) == 2
    assert "make room or choose another place, and run the same command again" in capfd.readouterr().out
    kept = list((tmp_path / "out.partial").glob("*.safetensors"))
    assert len(kept) == 3  # the decoder's layers; the embedding was too large
    mixquant.quantize(folder, "nvfp4", output=tmp_path / "out", calibration=None)
    load_model(find(tmp_path / "out"), "nvfp4", torch.device("cpu"))


@pytest.mark.parametrize("ignore_worst", [None, 0.4])
def test_a_model_in_memory_is_killed_and_resumed(tmp_path: Path, ignore_worst: float | None) -> None:
    """The copy that a kill leaves goes with the next run; layers are not measured again."""
    model = outlier_model(num_hidden_layers=1, max_position_embeddings=4096)
    model.name_or_path = str(save(model, tmp_path / "model"))
    output = tmp_path / "out"

    def work(**options: Any) -> None:
        mixquant.quantize(model, output=output, calibration=None, ignore_worst=ignore_worst, **options)

    assert exit_code(lambda: work(progress=stop_after_first_shard)) == 1
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


def test_a_disk_too_full_for_the_copy_of_a_model_in_memory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = outlier_model()

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        mixquant.quantize(model, "nvfp4", output=tmp_path / "deep" / "out", calibration=None)

    assert exit_code(work) == 2
    assert "cannot be written" in (said := capfd.readouterr().out)
    assert "layers are kept" not in said
    assert list(tmp_path.iterdir()) == []


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


def test_overwriting_leaves_what_mixquant_did_not_write(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    with pytest.raises(InputError, match=r"thesis was not written by `mixquant quantize`"):
        mixquant.quantize(folder, "fp8", output=tmp_path / "thesis", overwrite=True)
