"""Mapped pages of weights that were packed into kernels' layouts are given back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from benchmarks.own_memory import resident_bytes
from safetensors import safe_open

from mixquant.checkpoint.locate import DEMO, find
from mixquant.checkpoint.mapped import release
from mixquant.integrations.transformers.loading import load_model
from mixquant.model import convert


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "model")


def test_released_pages_are_read_again_from_the_file(copy: Path) -> None:
    file = copy / "model.safetensors"
    with safe_open(file, framework="pt") as tensors:
        name = max(tensors.keys(), key=lambda key: tensors.get_tensor(key).nbytes)
        weight = tensors.get_tensor(name)
        before = weight.clone()
        held = resident_bytes(file)
        assert held >= weight.nbytes
        release(weight)
        assert resident_bytes(file) <= held - weight.nbytes + 8192
        assert torch.equal(weight, before)


def test_control_memory_of_the_process_is_never_touched() -> None:
    """The same advice for anonymous memory would leave zeros."""
    tensor = torch.ones(1 << 20)
    release(tensor)
    assert tensor.sum() == 1 << 20


@pytest.mark.parametrize("released", [True, False], ids=["released", "control"])
def test_loading_leaves_no_packed_weight_resident(copy: Path, released: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform FP8 keeps no BF16 weight: what stays of the file is its embeddings and norms."""
    if not released:
        monkeypatch.setattr(convert, "release", lambda weight: None)
    model = load_model(find(copy), "uniform-fp8", torch.device("cpu"))
    rest = sum(parameter.nbytes for parameter in model.parameters())
    packed = (copy / "model.safetensors").stat().st_size - rest
    left = resident_bytes(copy / "model.safetensors")
    assert left < rest + 0.1 * packed if released else left > rest + 0.9 * packed
