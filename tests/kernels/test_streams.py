"""Two products at once: results of one after the other, however often memory changes hands on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from mixquant.kernels import streams
from mixquant.kernels.streams import side_by_side

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
LAYERS, ROWS, FEW, WIDE = 24, 512, 3, 512


@pytest.fixture(autouse=True)
def so_few_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HIDES_LAUNCHES", 0)


@pytest.fixture(params=DEVICES)
def weights(request: pytest.FixtureRequest) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(LAYERS, WIDE, WIDE, generator=generator) / WIDE**0.5).to(request.param)


def forward(x: Tensor, weights: Tensor, at_once: bool) -> Tensor:
    """Layers whose last rows are multiplied by the weight, and all others by its half."""
    for weight in weights:

        def few(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return linear(x[-FEW:] * 1.0, weight)

        def many(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            return linear(x, weight * 0.5)

        small, large = side_by_side(x, few, many) if at_once else (few(), many())
        large[-FEW:] = small
        x = large / large.norm(dim=1, keepdim=True)
    return x


def test_two_products_at_once_are_those_of_one_after_the_other(weights: Tensor) -> None:
    x = torch.randn(ROWS, WIDE, device=weights.device)
    for _ in range(20):
        torch.testing.assert_close(forward(x, weights, True), forward(x, weights, False), rtol=0, atol=0)


def test_control_the_few_rows_are_others(weights: Tensor) -> None:
    x = torch.randn(ROWS, WIDE, device=weights.device)
    small, large = side_by_side(x, lambda: linear(x[-FEW:], weights[0]), lambda: linear(x, weights[0] * 0.5))
    assert (small - large[-FEW:]).norm() > 0.4 * small.norm()


@needs_cuda
def test_a_graph_forks_and_joins() -> None:
    weights = torch.randn(LAYERS, WIDE, WIDE, device="cuda") / WIDE**0.5
    x = torch.randn(ROWS, WIDE, device="cuda")
    forward(x, weights, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(x, weights, True)
    for _ in range(20):
        x.normal_()
        graph.replay()
        torch.testing.assert_close(out, forward(x, weights, False), rtol=0, atol=0)
