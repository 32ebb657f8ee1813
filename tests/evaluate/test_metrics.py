"""Measures against torch, NumPy, simulation and the formulas of llama.cpp's `llama-perplexity --kl-divergence`."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from mixquant.evaluate import metrics

FLOATS = st.floats(-1e6, 1e6)
TOKENS = st.lists(st.integers(0, 2), max_size=6)


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
    assert math.isnan(metrics.estimate([]).mean)


def test_llama_cpp_defines_the_figures_of_single_tokens() -> None:
    """Its sums over tokens, written out; with answers of one token, tokens are examples."""
    torch.manual_seed(1)
    base, quantized = torch.randn(401, 30, dtype=torch.float64), torch.randn(401, 30, dtype=torch.float64)
    klds, same = [], 0
    for p, q in zip(base.log_softmax(-1).tolist(), quantized.log_softmax(-1).tolist(), strict=True):
        klds.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
        same += max(range(30), key=p.__getitem__) == max(range(30), key=q.__getitem__)
    n = len(klds)
    mean, squares = sum(klds) / n, sum(x * x for x in klds) / n
    ours = metrics.estimate(metrics.kl_divergence(base, quantized).tolist())
    assert ours.mean == pytest.approx(mean, rel=1e-12)
    assert ours.se == pytest.approx(math.sqrt((squares - mean**2) / (n - 1)), rel=1e-9)
    top = metrics.estimate((base.argmax(-1) == quantized.argmax(-1)).double().tolist())
    share = same / n
    assert 0 < share < 1
    assert (top.mean, top.se) == pytest.approx((share, math.sqrt(share * (1 - share) / (n - 1))))
    ordered = sorted(klds)
    assert metrics.quantile(ordered, 0.5) == pytest.approx(ordered[n // 2])
    for fraction in (0.999, 0.99, 0.9, 0.1, 0.01):
        place = fraction * (n - 1)
        below = int(place)
        rest = place - below
        expected = (1 - rest) * ordered[below] + rest * ordered[min(below + 1, n - 1)]
        assert metrics.quantile(ordered, fraction) == pytest.approx(expected)


@given(st.lists(FLOATS, min_size=1, max_size=30), st.floats(0, 1))
def test_quantiles_equal_numpys(values: list[float], q: float) -> None:
    expected = float(np.quantile(values, q))
    assert metrics.quantile(sorted(values), q) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_a_quantile_may_be_infinite() -> None:
    assert metrics.quantile([1.0, 3.0, math.inf], 0.5) == 3.0
    assert metrics.quantile([1.0, math.inf, math.inf], 0.5) == math.inf


def coverage(draw: object, truth: float, runs: int = 400) -> float:
    """Share of simulated intervals that hold the truth."""
    hits = 0
    for _ in range(runs):
        low, high = draw()  # type: ignore[operator]
        hits += low <= truth <= high
    return hits / runs


def test_a_quantiles_interval_counts_groups_and_not_values() -> None:
    """Values of one group are nearly equal, so there are 80 independent values and not 800."""
    rng = random.Random(0)

    def interval(grouped: bool) -> tuple[float, float]:
        centres = [rng.gauss(0, 1) for _ in range(80)]
        groups = [[centre + rng.gauss(0, 0.05) for _ in range(10)] for centre in centres]
        ordered = sorted(value for group in groups for value in group)
        return metrics.quantile_interval(groups if grouped else [[x] for x in ordered], ordered, 0.75)

    truth = math.sqrt(1 + 0.05**2) * 0.6744897501960817
    assert coverage(lambda: interval(True), truth) > 0.91
    assert coverage(lambda: interval(False), truth) < 0.6


def test_one_group_has_no_interval() -> None:
    assert all(math.isnan(end) for end in metrics.quantile_interval([[1.0, 2.0]], [1.0, 2.0], 0.5))


def test_the_error_of_a_ratio_counts_that_its_parts_go_together() -> None:
    """Recovery of an arm that answers almost as the reference: most of the accuracies' spread is shared."""
    rng = random.Random(1)

    def answers() -> tuple[list[bool], list[bool]]:
        reference = [rng.random() < 0.6 for _ in range(400)]
        return [right and rng.random() < 0.95 for right in reference], reference

    estimates = [metrics.ratio(*answers()) for _ in range(300)]
    spread = np.std([e.mean for e in estimates], ddof=1)
    assert np.mean([e.se for e in estimates]) == pytest.approx(spread, rel=0.12)
    arm, reference = answers()
    apart = math.hypot(metrics.estimate(arm).se, metrics.estimate(reference).se) / 0.6
    assert apart > 3 * spread  # errors of two independent accuracies would be far too large


def test_the_ratio_to_nothing_is_no_number() -> None:
    assert math.isnan(metrics.ratio([0, 0], [0, 0]).mean)


@given(TOKENS, TOKENS)
def test_the_first_divergence_ends_the_longest_common_beginning(answer: list[int], reference: list[int]) -> None:
    first = metrics.first_divergence(answer, reference)
    if first is None:
        assert answer == reference
    else:
        assert answer[:first] == reference[:first]
        assert answer[: first + 1] != reference[: first + 1]


@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=8))
def test_survival_is_the_share_of_equal_beginnings(pairs: list[tuple[list[int], list[int]]]) -> None:
    longest = max(len(tokens) for pair in pairs for tokens in pair)
    steps = metrics.survival([metrics.first_divergence(*pair) for pair in pairs], longest)
    assert steps[0] == (0, 1.0)
    assert steps[-1][0] == longest
    for tokens in range(longest + 1):
        share = [value for start, value in steps if start <= tokens][-1]
        assert share == pytest.approx(sum(a[:tokens] == b[:tokens] for a, b in pairs) / len(pairs))
