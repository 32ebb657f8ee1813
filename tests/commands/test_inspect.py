"""`mixquant inspect`: every folder that we read, from headers alone, and one sentence for what is none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixquant.checkpoint.sidecar import DecodeModel, Sidecar, write_sidecar
from mixquant.commands import inspect as inspection
from mixquant.errors import InputError
from mixquant.policy import Policy
from tests.commandline import call, run
from tests.folders import LAYOUTS, write_quantized

LAYER = "model.layers.1.mlp.up_proj"  # [128, 64]

BITS = {"nvfp4": 4 + 8 / 16, "fp8": 8 + 32 / 64, "int8": 8 + 32 / 64}
"""Of a weight, with its share of the scales of a row of 64."""


@pytest.mark.parametrize(("tool", "format"), LAYOUTS)
def test_every_layout(tiny_folder: Path, tmp_path: Path, tool: str, format: str) -> None:
    path = write_quantized(tiny_folder, tmp_path / "q", format, tool, ignore=("o_proj",))
    report = inspection.inspect(path)
    globals_ = 8 if format == "nvfp4" else 0  # of the weight and of its activations
    assert (report["format"], report["tool"]) == (format, tool)
    assert report["layers"][LAYER] == {
        "format": format,
        "shape": [128, 64],
        "bytes": 128 * 64 * BITS[format] / 8 + globals_,
    }
    assert sum(layer["format"] == format for layer in report["layers"].values()) == 3 * 6
    assert sorted(report["ignored"]) == sorted(
        ["lm_head", "model.embed_tokens", *(f"model.layers.{i}.self_attn.o_proj" for i in range(3))]
    )
    assert report["layers"]["model.layers.0.self_attn.o_proj"] == {"format": "bf16", "shape": [64, 64], "bytes": 8192}
    tensors = load_file(path / "model.safetensors").values()
    assert report["bytes"] == sum(tensor.nbytes for tensor in tensors)
    assert (report["policy"], report["recipe"], report["decode_model"]) == (None, None, None)


def test_what_our_quantizer_says(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_quantized(tiny_folder, tmp_path / "q")
    model = DecodeModel("Qwen/Qwen3-8B", "main", "abc")
    write_sidecar(path, Sidecar(Policy(prefill="nvfp4", tail=2), model, {"scales": "search", "fold": True}))
    report = inspection.inspect(path)
    assert report["policy"]["tail"] == 2
    assert report["recipe"] == {"scales": "search", "fold": True}
    assert report["decode_model"] == {"model": "Qwen/Qwen3-8B", "revision": "main", "hash": "abc"}


def test_a_hundred_gigabytes_by_their_headers(tiny_folder: Path, tmp_path: Path) -> None:
    """The folder of a model with 100 decoder layers of 1 GB, whose data is a hole in the file: nobody reads it."""
    path = write_quantized(tiny_folder, tmp_path / "q")
    write_hollow(path / "model.safetensors", layers=100, size=2**30)
    report = inspection.inspect(path)
    assert report["bytes"] > 100e9
    assert len(report["layers"]) == 700


def write_hollow(file: Path, layers: int, size: int) -> None:
    """A safetensors file of `layers` decoder layers with seven NVFP4 layers, of about `size` bytes a decoder layer."""
    entries: dict[str, Any] = {}
    columns = 8192
    rows = size // 7 // (columns * 9 // 16)
    end = 0
    shapes = {"weight_packed": ("U8", [rows, columns // 2], 1), "weight_scale": ("F8_E4M3", [rows, columns // 16], 1)}
    shapes |= {"weight_global_scale": ("F32", [1], 4)}
    for layer in range(layers):
        for own in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            for name, (dtype, shape, itemsize) in shapes.items():
                start, end = end, end + torch.Size(shape).numel() * itemsize
                entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
                entries[f"model.layers.{layer}.{own}.{name}"] = entry
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + end)


def test_the_command(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = write_quantized(tiny_folder, tmp_path / "q", ignore=("layers.2.self_attn.o_proj",))
    assert json.loads(call("inspect", path, "--json").stdout) == inspection.inspect(path)
    table = call("inspect", path).stdout
    rows = [line.split() for line in table.splitlines() if "o_proj" in line]
    assert [row[1:4] for row in rows] == [["2", "nvfp4", "64"], ["1", "bf16", "64"]]
    assert "BF16 model: not named" in table


def test_names_stay_whole_on_a_narrow_terminal(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multimodal model's long names in 40 columns: each kind of layer is one line with its whole name."""
    monkeypatch.setenv("COLUMNS", "40")
    path = write_quantized(tiny_folder, tmp_path / "q")
    tensors = load_file(path / "model.safetensors")
    prefix = "language_model.model.text_decoder"
    save_file({name.replace("model", prefix): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    lines = call("inspect", path).stdout.splitlines()
    kinds = [line.split()[0] for line in lines if line.startswith(f"{prefix}.layers")]
    assert f"{prefix}.layers.*.mlp.down_proj" in kinds
    assert len(kinds) == len(set(kinds)) == 7


def refuse_truncated(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def refuse_header(path: Path) -> None:
    """An offset that is no number; the file is as long as before."""
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"data_offsets":[', b'"data_offsets":{', 1))


def refuse_missing_shard(path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (refuse_truncated, "truncated or damaged"),
        (refuse_header, "is damaged"),
        (refuse_missing_shard, "lacks the shard model-00002-of-00002.safetensors: download it"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "config.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path / "config.json").write_text("[]"), "is not a JSON object"),
        (lambda path: (path / "mixquant.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path / "mixquant.json").write_text("{}"), "is damaged"),
        (lambda path: (path / "model.safetensors").unlink(), "has no safetensors weights"),
    ],
)
def test_damaged_folders(tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    path = write_quantized(tiny_folder, tmp_path / "q")
    damage(path)
    with pytest.raises(InputError, match=words):
        inspection.inspect(path)


def test_what_is_no_quantized_folder(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no quantized layer: name a compressed-tensors or ModelOpt folder"):
        inspection.inspect(tiny_folder)
    with pytest.raises(InputError, match="is not a folder"):
        inspection.inspect(tmp_path / "nowhere")
    with pytest.raises(InputError, match="RedHatAI/Qwen3-8B-NVFP4 is not a folder: download the model"):
        inspection.inspect("RedHatAI/Qwen3-8B-NVFP4")


def test_bytes_of_a_path_that_are_no_text_are_escaped(tiny_folder: Path, tmp_path: Path) -> None:
    """In JSON by its own escape, so that the document says the path again."""
    path, model = write_quantized(tiny_folder, tmp_path / "q"), os.fsdecode(b"/models/\xff")
    write_sidecar(path, Sidecar(Policy(prefill="nvfp4"), DecodeModel(model)))
    assert json.loads(run("inspect", path, "--json").stdout)["decode_model"]["model"] == model
    assert r"BF16 model: /models/\udcff" in run("inspect", path).stdout
