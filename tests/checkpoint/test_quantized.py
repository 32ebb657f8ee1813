"""Reading other tools' folders: tensors come back unchanged, and what mixquant would leave out is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.errors import InputError
from mixquant.formats import quantizer
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.formats.rowwise import RowwiseTensor
from tests.folders import LAYOUTS, group_amax, write_quantized

LAYER = "model.layers.1.mlp.up_proj"

Change = Callable[[dict[str, Tensor]], None]


def changed(folder: Path, change: Change) -> Path:
    """The folder after its tensors were changed in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("tool", "format"), LAYOUTS)
def test_tensors_come_back_unchanged(tiny_folder, tmp_path, tool, format):
    folder = QuantizedFolder(write_quantized(tiny_folder, tmp_path / "q", format, tool, activation=8.0))
    weights = load_file(tiny_folder / "model.safetensors")
    expected = quantizer(format, "search", group_amax(weights, names(weights))[LAYER])(weights[f"{LAYER}.weight"])
    stored = folder.read(LAYER)
    assert folder.formats == {format}
    assert stored.activation_global_scale == (8.0 if format == "nvfp4" else None)
    for name in vars(expected):
        assert torch.equal(getattr(stored.weight, name), getattr(expected, name))


def names(weights: dict[str, Tensor]) -> list[str]:
    return [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]


def test_layers_left_in_bf16(tiny_folder, tmp_path):
    folder = QuantizedFolder(write_quantized(tiny_folder, tmp_path / "q", ignore=("o_proj",)))
    assert folder.format("model.layers.0.self_attn.o_proj") == "bf16"
    assert folder.format("model.layers.0.self_attn.q_proj") == "nvfp4"
    assert "model.layers.0.self_attn.qkv_proj" not in folder
    assert "model.norm" in folder


def test_sharded_files(tiny_folder, tmp_path):
    whole = write_quantized(tiny_folder, tmp_path / "whole")
    parts = write_quantized(tiny_folder, tmp_path / "parts")
    tensors = load_file(parts / "model.safetensors")
    files = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, parts / file)
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (parts / "model.safetensors").write_bytes(b"not in the index, so not opened")
    one, other = (QuantizedFolder(path).read(LAYER).weight for path in (whole, parts))
    assert isinstance(one, NVFP4Tensor)
    assert isinstance(other, NVFP4Tensor)
    assert torch.equal(one.packed, other.packed)


def test_one_scale_for_all_rows(tiny_folder, tmp_path):
    """A scale per tensor is the same scale for each row."""

    def single(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.weight_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)
        tensors[f"{LAYER}.input_scale"] = torch.tensor([0.1])

    folder = QuantizedFolder(changed(write_quantized(tiny_folder, tmp_path / "q", "fp8"), single))
    weight = folder.read(LAYER).weight
    assert isinstance(weight, RowwiseTensor)
    assert torch.equal(weight.scales, torch.full((128, 1), 0.5))


def replace_tensor(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors.update({f"{LAYER}.{name}": tensor})


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("int8", replace_tensor("weight_zero_point", torch.zeros(128, 1)), "a way that mixquant does not know .*zero"),
        ("nvfp4", replace_tensor("pre_quant_scale", torch.ones(64)), "a way that mixquant does not know .*pre_quant"),
        ("nvfp4", replace_tensor("weight_packed", torch.zeros(128, 8).int()), "a way that mixquant does not know"),
        ("nvfp4", lambda t: t.pop(f"{LAYER}.weight_global_scale"), "a way that mixquant does not know"),
        (
            "nvfp4",
            replace_tensor("weight_scale", torch.ones(128, 2).to(torch.float8_e4m3fn)),
            r"\[128, 2\], not \[128, 4\]",
        ),
        (
            "nvfp4",
            replace_tensor("weight_scale", torch.ones(128, 4)),
            r"block scales of torch.float32, not float8_e4m3fn",
        ),
        (
            "nvfp4",
            replace_tensor("weight_scale", torch.tensor([[1.0, 0.0, -0.0, -2.0]] * 128).to(torch.float8_e4m3fn)),
            "128 block scales that are negative or NaN",
        ),
        (
            "nvfp4",
            replace_tensor("weight_scale", torch.tensor([[1.0, 2.0, 448.0, torch.nan]] * 128).to(torch.float8_e4m3fn)),
            "128 block scales that are negative or NaN",
        ),
        ("nvfp4", replace_tensor("weight_global_scale", torch.ones(2)), r"shape \[2\], not one number"),
        ("nvfp4", replace_tensor("input_global_scale", torch.ones(2)), r"shape \[2\], not one number"),
        *(
            (format, replace_tensor("weight_scale", torch.tensor([[scale]] + [[0.5]] * 127)), "1 weight scales that")
            for format in ("fp8", "int8")
            for scale in (torch.nan, torch.inf, -0.5)
        ),
        ("fp8", replace_tensor("weight_scale", torch.tensor(torch.nan)), "128 weight scales that are negative, Inf"),
        ("fp8", replace_tensor("weight_scale", torch.ones(1, 64)), r"weight_scale of shape \[1, 64\], not \[128, 1\]"),
    ],
)
def test_what_cannot_be_read_is_refused(tiny_folder, tmp_path, format, change, words):
    folder = QuantizedFolder(changed(write_quantized(tiny_folder, tmp_path / "q", format), change))
    with pytest.raises(InputError, match=rf"{LAYER} in .*{words}"):
        folder.read(LAYER)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan, -4.0, 1e-42])  # 1 / 1e-42 is more than float32 holds
@pytest.mark.parametrize(
    ("tool", "name"), [("compressed-tensors", "weight_global_scale"), ("modelopt", "weight_scale_2")]
)
def test_a_weight_s_global_scale_that_is_no_multiplier_is_refused(
    tiny_folder: Path, tmp_path: Path, tool: str, name: str, value: float
) -> None:
    def one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{name}"] = torch.full_like(tensors[f"{LAYER}.{name}"], value)

    folder = QuantizedFolder(changed(write_quantized(tiny_folder, tmp_path / "q", "nvfp4", tool), one))
    with pytest.raises(InputError, match=rf"{LAYER} in .* has {name} .*, which no weight has: quantize the model"):
        folder.read(LAYER)


@pytest.mark.parametrize(("tool", "name", "factor"), [
    ("compressed-tensors", "weight_global_scale", 4.0), ("modelopt", "weight_scale_2", 0.25),
])  # fmt: skip
def test_a_weight_s_global_scale_is_read_as_its_tool_means_it(
    tiny_folder: Path, tmp_path: Path, tool: str, name: str, factor: float
) -> None:
    path = write_quantized(tiny_folder, tmp_path / "q", "nvfp4", tool)
    before = QuantizedFolder(path).read(LAYER).weight

    def one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{name}"] = tensors[f"{LAYER}.{name}"] * factor

    after = QuantizedFolder(changed(path, one)).read(LAYER).weight
    assert isinstance(before, NVFP4Tensor)
    assert isinstance(after, NVFP4Tensor)
    assert torch.equal(after.global_scale, before.global_scale * 4)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_a_scale_of_zero_is_a_row_of_zeros(tiny_folder: Path, tmp_path: Path, format: str) -> None:
    zero = replace_tensor("weight_scale", torch.tensor([[0.0]] + [[0.5]] * 127))
    stored = QuantizedFolder(changed(write_quantized(tiny_folder, tmp_path / "q", format), zero)).read(LAYER).weight
    assert isinstance(stored, RowwiseTensor)
    assert stored.scales.flatten().tolist() == [0.0] + [0.5] * 127


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: (2**63).to_bytes(8, "little") + content[8:],
        lambda content: content[:8] + b"[" + content[9:],
        lambda content: content.replace(b'"data_offsets":[', b'"data_offsets":{', 1),
        lambda content: content.replace(b'"dtype":', b'"dtypo":', 1),
        lambda content: (2).to_bytes(8, "little") + b"[]",
        lambda content: b"",
    ],
)
def test_a_damaged_header_is_one_sentence(tiny_folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = write_quantized(tiny_folder, tmp_path / "q")
    file = folder / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"model.safetensors is (truncated or )?damaged .*: download it again\."):
        QuantizedFolder(folder)


def test_rotated_folders_are_refused(tiny_folder, tmp_path):
    folder = write_quantized(tiny_folder, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": {"u": {"type": "hadamard"}}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="rotates activations"):
        QuantizedFolder(folder)


def test_plain_folders_are_refused(tiny_folder):
    with pytest.raises(InputError, match="holds no quantized layer"):
        QuantizedFolder(tiny_folder)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan, 1e-30, 3e38, -4.0])
@pytest.mark.parametrize(("tool", "name"), [("compressed-tensors", "input_global_scale"), ("modelopt", "input_scale")])
def test_activation_scales_that_no_calibration_finds(tiny_folder, tmp_path, tool, name, value):
    def one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.{name}"] = torch.full_like(tensors[f"{LAYER}.{name}"], value)

    folder = QuantizedFolder(changed(write_quantized(tiny_folder, tmp_path / "q", "nvfp4", tool, activation=8.0), one))
    with pytest.raises(InputError, match=rf"{LAYER} in .* has {name} .*, which no calibration finds"):
        folder.check_activation_scales()


@pytest.mark.parametrize("tool", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("activation", [300.0, 4.0, 2.0**-4])
def test_reciprocals_of_activation_scales_are_noticed(tiny_folder, tmp_path, tool, activation):
    """300 says that inputs reach 9, and 1/300 that they reach 800,000."""
    QuantizedFolder(
        write_quantized(tiny_folder, tmp_path / "q", "nvfp4", tool, activation=activation)
    ).check_activation_scales()
    other = write_quantized(tiny_folder, tmp_path / "r", "nvfp4", tool, activation=1 / 300)
    with pytest.raises(InputError, match=rf"look like the reciprocals of what {tool} stores"):
        QuantizedFolder(other).check_activation_scales()


def test_one_layer_with_massive_inputs_is_no_reciprocal(tiny_folder, tmp_path):
    def one(tensors: dict[str, Tensor]) -> None:
        tensors[f"{LAYER}.input_global_scale"] = torch.full_like(tensors[f"{LAYER}.input_global_scale"], 2.0**-7)

    folder = QuantizedFolder(changed(write_quantized(tiny_folder, tmp_path / "q", activation=8.0), one))
    folder.check_activation_scales()
    assert folder.read(LAYER).activation_global_scale == 2.0**-7
