"""BF16 products on a CPU without BF16 instructions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixquant.kernels import dense
from mixquant.kernels.dense import Dense
from tests.formats.inputs import gaussian
from tests.kernels.accuracy import CPU, UNIT, K, N, eighths, weights


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without BF16 instructions: FP32 products run on any."""
    monkeypatch.setattr(dense, "has_bf16", lambda: False)


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("rows", [1, dense.WIDENED_ROWS - 1, dense.WIDENED_ROWS, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_widened_products_are_rounded_once(rows: int, biased: bool) -> None:
    x, weight = gaussian(rows, K).to(torch.bfloat16), weights(torch.bfloat16)
    bias = eighths(torch.bfloat16) if biased else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sums = x.double().abs() @ weight.double().abs().T * K * UNIT[torch.float32]
    limit = exact.abs() * UNIT[torch.bfloat16] + sums
    for product in (Dense(weight)(x, bias), dense.widened_linear(x, weight, bias)):
        assert product.dtype is torch.bfloat16
        assert ((product.double() - exact).abs() <= limit).all()
    other = dense.widened_linear(x.roll(1, dims=1), weight, bias).double()
    assert not ((other - exact).abs() <= limit).all()  # control


@pytest.mark.usefixtures("plain_cpu")
def test_a_model_that_was_not_converted_gets_the_fastest_products() -> None:
    """Every nn.Linear of BF16, and only those; batches keep their shape."""
    layer, other = nn.Linear(K, N).to(torch.bfloat16), nn.Linear(K, N)
    x = gaussian(40, K).to(torch.bfloat16).view(2, 20, K)
    seen: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "widened_linear", lambda x, w, b: seen.append(x.shape) or nn.functional.linear(x, w, b))
        dense.use_fastest_linear_(nn.ModuleList([layer, other]), CPU)
        assert layer(x).shape == (2, 20, N)
        other(x.float())
    assert seen == [(2, 20, K)]
    assert dense.widened_linear(x, layer.weight, layer.bias).shape == (2, 20, N)
