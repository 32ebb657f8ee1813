"""mixquant loads what mixquant wrote: a folder's weights are known as copies, however far GPTQ moved them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mixquant
from mixquant.checkpoint.locate import find
from mixquant.checkpoint.prefill import is_copy
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.formats import Quantized, quantizer
from mixquant.integrations.transformers.loading import load_model
from tests.conftest import tiny_qwen3
from tests.offline.checkpoints import SIZES, save, tensors

OUTLIER = 3000.0
WORDS = ["the order", "of", "482", "pens", "and", "193", "cups", "was sent to", "Oslo", "in a box", "weighs", "?"]


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Quantized, Tensor]]:
    """Each layer's quantized weight and the BF16 one beside it, of a folded GPTQ folder with outlier channels."""
    path = tmp_path_factory.mktemp("outliers")
    model = tiny_qwen3(torch.bfloat16, **SIZES | {"hidden_size": 128, "intermediate_size": 256})
    for parameter in model.parameters():
        parameter.data.mul_(1 / 3 if parameter.ndim > 1 else 1)  # outputs of outliers stay within sane magnitudes
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[[7, 90]] = OUTLIER
        layer.post_attention_layernorm.weight.data[[31, 66]] = OUTLIER
    dice = random.Random(0)
    text = path / "text.txt"
    text.write_text(" ".join(dice.choice(WORDS) for _ in range(4000)))
    mixquant.quantize(save(model, path / "m"), "nvfp4", output=path / "q", calibration=text, fold=True, gptq=True)
    assert load_model(find(path / "q"), "nvfp4", torch.device("cpu"))
    folder, originals = QuantizedFolder(path / "q"), tensors(path / "q" / "decode")
    layers = [layer for layer in folder.layers() if folder.format(layer) == "nvfp4"]
    return {layer: (folder.read(layer).weight, originals[f"{layer}.weight"]) for layer in layers}


def test_every_weight_is_a_copy(copies: dict[str, tuple[Quantized, Tensor]]) -> None:
    assert all(is_copy(*pair) for pair in copies.values())
    distances = [distance(quantized, weight) for quantized, weight in copies.values()]
    assert max(distances) > 0.1, "ten times what rounding makes: distance would not know them"


def distance(quantized: Quantized, weight: Tensor) -> float:
    exact = weight.double()
    return float((quantized.dequantize().double() - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: -weight,
        lambda weight: weight.flip(0),
        lambda weight: weight.flip(1),
        lambda weight: torch.cat([weight[: len(weight) // 2].flip(0), weight[len(weight) // 2 :]]),
        lambda weight: weight * 2.0 ** (torch.arange(weight.shape[0]) % 3 - 1).unsqueeze(1),
        lambda weight: weight * 2.0 ** (torch.arange(weight.shape[1]) % 3 - 1),
        lambda weight: weight[: len(weight) // 2],
        lambda weight: torch.zeros_like(weight),
        lambda weight: weight * torch.nan,
    ],
)
def test_control_of_no_other_weight(
    copies: dict[str, tuple[Quantized, Tensor]], change: Callable[[Tensor], Tensor]
) -> None:
    """Signs, orders, factors of rows (values, up_proj) and of columns (norms), sizes."""
    assert not any(is_copy(quantized, change(weight)) for quantized, weight in copies.values())


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "int8"])
def test_a_weight_of_zeros_is_its_own_copy(format: str) -> None:
    assert is_copy(quantizer(format)(torch.zeros(32, 64)), torch.zeros(32, 64))
