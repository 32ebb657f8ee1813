"""`find`: what MODEL stands for is looked up once, by one rule, and every wrong name is one sentence."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from mixquant.checkpoint import locate, quantized, shards, sidecar
from mixquant.checkpoint.locate import DEMO, fetch, find
from mixquant.checkpoint.shards import INDEX
from mixquant.checkpoint.sidecar import SIDECAR
from mixquant.errors import InputError
from tests.commandline import call
from tests.folders import name_decode_model, write_quantized


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The model's quantized folder, with its mixquant.json."""
    path = write_quantized(tiny_folder, tmp_path / "quantized")
    name_decode_model(path, tiny_folder, {"prefill": "nvfp4"})
    return path


def test_a_plain_folder_stands_for_itself(tiny_folder: Path) -> None:
    found = find(tiny_folder)
    assert (found.name, found.decode, found.folder) == (str(tiny_folder), str(tiny_folder), tiny_folder)
    assert found.quantized is found.sidecar is None
    assert found.served == str(tiny_folder)
    assert found.download() == fetch(str(tiny_folder)) == tiny_folder


def test_demo_is_the_shipped_model() -> None:
    assert find("demo").folder == DEMO


def test_a_quantized_folder_brings_its_bf16_model(tiny_folder: Path, folder: Path) -> None:
    found = find(folder)
    assert found.folder == tiny_folder.resolve()
    assert found.quantized is not None
    assert found.quantized.path == folder
    assert found.quantized.formats == {"nvfp4"}
    assert found.sidecar is not None
    assert found.served == str(folder)
    found.check()


def test_the_bf16_model_of_another_folder_is_noticed(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][3] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((folder / SIDECAR).read_text())
    document["decode_model"]["model"] = str(other)
    (folder / SIDECAR).write_text(json.dumps(document))
    with pytest.raises(InputError, match="is not the BF16 model that the quantized weights belong to"):
        find(folder).check()


QUANTIZED: dict[str, Callable[[dict[str, Any]], None]] = {
    "at the top": lambda config: config.update(quantization_config={"quant_method": "awq"}),
    "in text_config": lambda config: config.update(text_config={"quantization_config": {"quant_method": "awq"}}),
}


@pytest.mark.parametrize("place", QUANTIZED)
def test_what_counts_as_quantized(tiny_folder: Path, tmp_path: Path, place: str) -> None:
    path = shutil.copytree(tiny_folder, tmp_path / "copy")
    edit(path / "config.json", QUANTIZED[place])
    with pytest.raises(InputError, match=r"already quantized by awq: use the BF16 model\.$"):
        find(path)


def test_modelopt_may_say_so_in_a_file_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_folder, tmp_path / "copy")
    (path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    with pytest.raises(InputError, match="already quantized by modelopt"):
        find(path)


def test_control_our_own_method_is_no_other_tools(tiny_folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_folder, tmp_path / "copy")
    edit(path / "config.json", lambda config: config.update(quantization_config={"quant_method": "mixquant"}))
    assert find(path).quantized is None


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text("[" * 100_000), "is nested too deeply"),
        (lambda path: (path / "model.safetensors").unlink(), "has no safetensors weights: convert or download"),
        (lambda path: (path / "model.safetensors").rename(path / "m.gguf"), r"GGUF is not read.*gguf_file='m.gguf'"),
        (lambda path: truncate(path / "model.safetensors", 100), r"model.safetensors is truncated or damaged"),
        (lambda path: truncate(path / "model.safetensors", 20_000_000), r"model.safetensors is .*damaged"),
        (lambda path: (path / "model.safetensors").write_bytes(b""), r"model.safetensors is damaged"),
        (lambda path: save_file({}, path / "model.safetensors"), r"holds no tensors: download the model again"),
        (lambda path: (path / INDEX).write_text('{"weight_map": {}}'), r"holds no tensors: download the model again"),
        (lambda path: (path / shards.INDEX).write_text('{"weight_map": 3}'), "has no weight_map"),
        (lambda path: (path / shards.INDEX).write_text('{"weight_map": {"a": [1]}}'), "no weight_map"),
        (lambda path: (path / shards.INDEX).write_text('{"weight_map": {"a": "b"}}'), "lacks .* b:"),
        (lambda path: edit(path / "config.json", lambda c: c.update(quantization_config=3)), "that is no object"),
    ],
)
def test_damaged_folders(tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str) -> None:
    path = shutil.copytree(tiny_folder, tmp_path / "copy")
    damage(path)
    with pytest.raises(InputError, match=sentence):
        find(path)


def truncate(path: Path, cut: int) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if cut < len(data) else data[:4])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("dmo", "There is no folder dmo: did you mean demo?"),
        ("./nowhere", "is not a folder: name a model folder, a hub id"),
        ("a/b/c", "is not a folder"),
        ("model.gguf", "is a GGUF file"),
    ],
)
def test_wrong_names_are_told_before_the_hub_is_asked(
    name: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(InputError, match=sentence):
        find(name)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"Cannot download no-such/model .*: check its name and the network"):
        find("no-such/model")
    with pytest.raises(InputError, match=r"Cannot download no-such/model .*: check its name and the network"):
        fetch("no-such/model")


# One `generate`, counted.


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model quantized to FP8, in four shards."""
    path = write_quantized(DEMO, tmp_path_factory.mktemp("sharded") / "q", "fp8")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 4}-of-00004.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensor.contiguous() for name, tensor in tensors.items() if files[name] == file}
        save_file(part, path / file, metadata={"format": "pt"})
    (path / shards.INDEX).write_text(json.dumps({"weight_map": files}))
    name_decode_model(path, DEMO, {"prefill": "fp8"})
    return path


def count(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, counts: Counter[str], key: Callable[..., str]
) -> None:
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[key(*args)] += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def generate(folder: Path, prompt: Path) -> None:
    said = call("generate", folder, "--prompt-file", prompt, "--max-new-tokens", "2", "--prefill", "fp8")
    assert said.returncode == 0, said.stderr


def test_one_generate_looks_model_up_once(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard is opened at most twice: to check its header, and to read its tensors."""
    (tmp_path / "prompt.txt").write_text("How many records are there?")
    looked_up: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    count(monkeypatch, locate, "locate", looked_up, lambda name, *_: str(name))
    count(monkeypatch, shards, "file_headers", opened, lambda file: file.name)
    for module in (quantized, sidecar):
        count(monkeypatch, module, "safe_open", opened, lambda file, *_: Path(file).name)
    generate(sharded, tmp_path / "prompt.txt")
    assert looked_up == {str(sharded): 1, str(DEMO): 1}  # MODEL, and the BF16 model that it names
    files = {file.name for file in sharded.glob("*.safetensors")}
    assert len(files) == 4
    assert {name: times for name, times in opened.items() if name in files} == dict.fromkeys(files, 2)
    assert opened["model.safetensors"] == 2  # the BF16 model's: checked, and fingerprinted


def test_a_bf16_model_on_the_hub_is_downloaded_once(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is stood in for by what a download leaves: the function is huggingface_hub's, its result the demo."""
    path = shutil.copytree(sharded, tmp_path / "q")
    edit(path / SIDECAR, lambda document: document["decode_model"].update(model="some/model", revision="abc"))
    (tmp_path / "prompt.txt").write_text("How many records are there?")
    calls: list[tuple[str, str | None]] = []

    def snapshot_download(model: str, revision: str | None = None, **_: Any) -> str:
        calls.append((model, revision))
        return str(DEMO)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    generate(path, tmp_path / "prompt.txt")
    assert calls == [("some/model", "abc")]


def test_control_the_counters_count(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[str] = Counter()
    count(monkeypatch, shards, "file_headers", opened, lambda file: file.name)
    find(sharded)
    find(sharded)
    assert set(opened.values()) == {2}
