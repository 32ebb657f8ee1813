"""Metrics against torch.distributions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from mixquant import metrics


def test_kl_equals_torch_distributions() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(7, 50, dtype=torch.float64), torch.randn(7, 50, dtype=torch.float64)
    expected = kl_divergence(Categorical(logits=p), Categorical(logits=q))
    torch.testing.assert_close(metrics.kl_divergence(p, q), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(metrics.kl_divergence(q, p), expected)  # the direction matters
    assert metrics.kl_divergence(p, p).abs().max() < 1e-14


def test_the_standard_error_is_that_of_a_mean() -> None:
    result = metrics.estimate([1.0, 2.0, 3.0, 4.0])
    assert result.mean == 2.5
    assert result.se == pytest.approx(math.sqrt(5 / 3 / 4))
    assert result.n == 4
    assert math.isnan(metrics.estimate([1.0]).se)
