"""Peak memory: one wide decoder layer in float32 bounds it, and ten layers take no more than one.

benchmarks/quantize_memory.py has the figures.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.own_memory import watched

import mixquant
from tests.offline.checkpoints import outlier_model, save

pytestmark = pytest.mark.slow

WIDE = {"hidden_size": 1024, "intermediate_size": 4608, "num_attention_heads": 16, "head_dim": 64}
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "head_dim": 64}
MIB = 2**20
TEMPORARIES = 60 * MIB
"""Chunks of rows, one sequence's activations, and what the allocator keeps: 39 to 54 MiB, less than a layer."""

RECIPES: dict[str, dict[str, Any]] = {
    "amax, no calibration": {"policy": {"prefill": "nvfp4", "scales": "amax"}, "calibration": None},
    "search": {"gptq": False},
    "fold and gptq": {"fold": True},
    "int8": {"policy": "int8", "calibration": None},
}


@pytest.fixture(autouse=True)
def blocks_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default glibc keeps what was freed for reuse, which then counts as taken."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(MIB))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model of one wide layer, and that layer's size in float32."""
    model = outlier_model(num_hidden_layers=1, **WIDE)
    layer = sum(p.numel() * 4 for p in model.model.layers[0].parameters())
    return save(model, tmp_path_factory.mktemp("wide")), layer


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_layer_in_float32_bounds_the_peak(recipe: str, wide: tuple[Path, int], text: Path, tmp_path: Path) -> None:
    """With GPTQ, the means of x x^T for its inputs and one more of the largest come on top."""
    model, layer = wide
    means = [4 * k * k for k in (1024, 1024, 1024, 4608)] if recipe == "fold and gptq" else []
    found = peak(model, tmp_path / "out", {"calibration": text} | RECIPES[recipe])
    assert layer > TEMPORARIES
    assert found < layer + sum(means) + max(means, default=0) + TEMPORARIES
    assert found > layer / 8, "the quantized layer must show"


def test_ten_more_layers_take_no_more_memory(text: Path, tmp_path: Path) -> None:
    peaks = {}
    for layers in (2, 12):
        model = outlier_model(num_hidden_layers=layers, **SMALL)
        layer = sum(p.nbytes for p in model.model.layers[0].parameters())
        save(model, tmp_path / str(layers))
        del model
        options = {"calibration": text} | {"policy": {"prefill": "nvfp4", "scales": "amax"}}
        peaks[layers] = peak(tmp_path / str(layers), tmp_path / f"{layers}-quantized", options)
    assert peaks[12] < peaks[2] + 4 * layer, "ten layers in BF16 would show"


def peak(model: Path, output: Path, options: dict[str, Any]) -> int:
    """Bytes of anonymous memory at the peak of a run in a process of its own, beyond what it began with."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(model, output, options, writer))
    process.start()
    writer.close()  # so that a run that fails ends the wait
    found: int = reader.recv()
    process.join()
    return found


def measure(model: Path, output: Path, options: dict[str, Any], writer: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    small = save(outlier_model(num_hidden_layers=1), output.with_name(f"{output.name}-small"))
    first = output.with_name(f"{output.name}-first")
    mixquant.quantize(small, output=first, **options)  # what is built once: imports, fused loops
    with watched() as taken:
        mixquant.quantize(model, output=output, **options)
    writer.send(taken.peak)
