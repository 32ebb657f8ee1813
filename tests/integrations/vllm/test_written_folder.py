"""What `mixquant quantize` writes, read by others: compressed-tensors, stock vLLM, and our plugin.

All must see the very numbers that we would make at load from the same BF16 model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor

import mixquant
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.shards import weight_files
from mixquant.formats import quantizer
from tests.folders import group_amax, write_folded
from tests.integrations.vllm import scenarios
from tests.integrations.vllm.refusals import refused
from tests.integrations.vllm.scenarios import PHASE, TOGETHER, Scenario
from tests.offline.checkpoints import chats, outlier_model, save

AS_MODEL = Scenario(None, {"quantization": "mixquant"})
UNIFORM = Scenario({"prefill": "nvfp4", "decode": "nvfp4"})


@pytest.fixture(scope="session")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny model's folder in each format, by our quantizer."""
    paths = {format: tmp_path_factory.mktemp("written") / format for format in ("nvfp4", "fp8", "int8")}
    for format, path in paths.items():
        mixquant.quantize(folder, f"{format},tail=1", output=path, calibration=None)
    return paths


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "int8"])
def test_compressed_tensors_decompresses_our_weights(written, folder, format):
    """Bit for bit, by its own reading of config.json."""
    original = load_file(folder / "model.safetensors")
    layers = QuantizedFolder(written[format])
    names = [layer for layer in layers.layers() if layers.format(layer) == format]
    amax = group_amax(original, names)
    assert len(names) == 3 * 7
    for name in names:
        ours = quantizer(format, "search", amax[name])(original[f"{name}.weight"])
        theirs = decompressed(written[format], name)
        assert torch.equal(theirs.float(), ours.dequantize())
        assert not torch.equal(theirs.float(), original[f"{name}.weight"])


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder by everything that the quantizer can do: calibrated, folded, rounded by GPTQ."""
    path = tmp_path_factory.mktemp("calibrated")
    model, text = save(outlier_model(head_dim=32), path / "model"), chats(path / "chats.jsonl", 60)
    return mixquant.quantize(model, "nvfp4", output=path / "out", calibration=text, fold=True, gptq=True).folder


def test_compressed_tensors_decompresses_calibrated_weights(calibrated):
    """What it reads is what we read, and no longer what search alone makes of the folded model."""
    layers = QuantizedFolder(calibrated)
    names = [layer for layer in layers.layers() if layers.format(layer) == "nvfp4"]
    decode = {name: tensor for file in weight_files(calibrated / "decode") for name, tensor in load_file(file).items()}
    amax = group_amax(decode, names)
    assert len(names) == 3 * 7
    for name in names:
        theirs = decompressed(calibrated, name).float()
        assert torch.equal(theirs, layers.read(name).weight.dequantize())
        assert not torch.equal(theirs, quantizer("nvfp4", "search", amax[name])(decode[f"{name}.weight"]).dequantize())


def test_stock_vllm_serves_a_calibrated_folder(check, calibrated, stock_nvfp4):
    """Stock vLLM on a calibrated, folded GPTQ folder, against both phases from it by the plugin"""
    from_it = Scenario(dict(UNIFORM.policy) | {"prefill_weights": str(calibrated)})
    check(
        scenarios.run(calibrated / "decode", from_it),
        scenarios.run(calibrated, Scenario(None)),
        scenarios.run(calibrated / "decode", UNIFORM),
        scenarios.run(calibrated, AS_MODEL),
    )


def decompressed(path: Path, layer: str) -> Tensor:
    """A layer's weight as compressed-tensors reads it."""
    config = QuantizationConfig.model_validate(json.loads((path / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    tensors = {name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()}
    own = {name.removeprefix(f"{layer}."): t for name, t in tensors.items() if name.startswith(f"{layer}.")}
    compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
    weight: Tensor = compressor.decompress(own, scheme)["weight"]
    return weight


def test_the_folder_as_the_model(run, check, written):
    """A folder of `mixquant quantize` served by its mixquant.json, against quantizing at load (bit-equal)"""
    check(scenarios.run(written["nvfp4"], AS_MODEL), run(TOGETHER), run(UNIFORM), run(Scenario(None)), exact=0.0)


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_other_formats(run, check, written, format):
    """An FP8 or INT8 folder of `mixquant quantize`, against quantizing at load (bit-equal)"""
    ours = scenarios.run(written[format], AS_MODEL)
    check(ours, run(Scenario(PHASE | {"prefill": format})), run(TOGETHER), exact=0.0)


def test_stock_vllm_serves_the_folder(run, check, written, stock_nvfp4):
    """Stock vLLM on a folder of `mixquant quantize`, against both phases quantized at load by the plugin"""
    check(scenarios.run(written["nvfp4"], Scenario(None)), run(UNIFORM), run(TOGETHER), run(Scenario(None)))


@pytest.fixture(scope="session")
def folded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folded(folder, tmp_path_factory.mktemp("folded") / "model")


def test_the_folded_folder_as_the_model(run, check, folded):
    """A folder with its folded BF16 model inside, against quantizing that model at load (bit-equal)"""
    at_load = scenarios.run(folded / "decode", TOGETHER)
    check(
        scenarios.run(folded, AS_MODEL),
        at_load,
        run(Scenario(None)),
        scenarios.run(folded / "decode", UNIFORM),
        exact=0.0,
    )


def test_folding_changes_no_answer(run, check, folded):
    """The folded BF16 model in stock vLLM, against the original (powers of two: bit-equal)"""
    check(scenarios.run(folded / "decode", Scenario(None)), run(Scenario(None)), run(TOGETHER), exact=0.0)


def test_the_original_model_is_refused(folder, folded):
    refused(
        f"{folder} is not the BF16 model that the quantized weights belong to: use {folded / 'decode'}",
        folder,
        PHASE | {"prefill_weights": str(folded)},
    )
