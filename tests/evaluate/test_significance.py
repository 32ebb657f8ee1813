"""Tests and intervals against SciPy, statsmodels and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from mixquant.evaluate import significance
from mixquant.evaluate.metrics import Z

COUNTS = st.integers(0, 200)


def test_z_is_the_normal_quantile() -> None:
    assert pytest.approx(norm.ppf(0.975), abs=1e-14) == Z


@given(COUNTS, COUNTS)
def test_two_sided_is_mcnemars_exact_test(more: int, less: int) -> None:
    p = significance.sign_test(more, less)
    assert p == pytest.approx(mcnemar([[0, more], [less, 0]], exact=True).pvalue, rel=1e-9, abs=1e-300)
    assert p == significance.sign_test(less, more)


@given(COUNTS, COUNTS)
def test_one_sided_is_the_binomial_test(more: int, less: int) -> None:
    p = significance.sign_test(more, less, one_sided=True)
    expected = binomtest(more, more + less, alternative="greater").pvalue if more + less else 1.0
    assert p == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_many_examples_neither_overflow_nor_lose_digits() -> None:
    expected = binomtest(12_400, 24_000, alternative="greater").pvalue
    assert significance.sign_test(12_400, 11_600, one_sided=True) == pytest.approx(expected, rel=1e-9)
    assert significance.sign_test(24_000, 0) == 0.0  # below the smallest float


@pytest.mark.parametrize(
    "p_values",
    [
        [0.3],
        [0.01, 0.04, 0.03, 0.005],
        [1.0, 0.0, 0.2, 0.2, 0.2, 1e-300, 0.049],
        np.random.default_rng(0).random(12).tolist(),
    ],
)
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    assert significance.holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


@given(st.integers(0, 100), st.integers(1, 100))
def test_wilson_equals_statsmodels(successes: int, n: int) -> None:
    successes = min(successes, n)
    expected = proportion_confint(successes, n, method="wilson")
    assert significance.wilson(successes, n) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("won", "lost"), [(0.0005, 0.0005), (0.01, 0.01), (0.02, 0.08), (0.0, 0.03)])
def test_the_paired_interval_holds_the_truth_where_few_answers_change(won: float, lost: float) -> None:
    rng = np.random.default_rng(0)
    n, runs = 500, 2000
    draws = rng.multinomial(n, [won, lost, 1 - won - lost], runs)
    hits = naive = 0
    for wins, losses, _ in draws.tolist():
        low, high = significance.paired_share_interval(wins, losses, n)
        hits += low <= won - lost <= high
        difference = (wins - losses) / n
        reach = Z * math.sqrt(((wins + losses) / n - difference**2) / n)
        naive += abs(difference - (won - lost)) <= reach
    assert hits / runs > 0.935
    assert naive <= hits  # Wald's interval has no width at all where nothing changed


def test_an_interval_without_a_change_is_about_the_rule_of_three() -> None:
    low, high = significance.paired_share_interval(0, 0, 1000)
    assert low == -high
    assert 0.002 < high < 0.004


MARGIN = 0.01


def decides(wins: int, losses: int, n: int) -> bool:
    """Whether a run's interval leaves out 0 or a loss of the margin."""
    low, high = significance.paired_share_interval(wins, losses, n)
    return low > 0 or high < 0 or low > -MARGIN or high < -MARGIN


@pytest.mark.parametrize(("won", "lost"), [(0.02, 0.02), (0.01, 0.04), (0.05, 0.062), (0.001, 0.0)])
def test_at_the_examples_needed_four_runs_of_five_decide(won: float, lost: float) -> None:
    rng = np.random.default_rng(1)
    n = 2000
    needed = significance.examples_needed(round(won * n), round(lost * n), n, MARGIN)

    def share(size: int) -> float:
        draws = rng.multinomial(size, [won, lost, 1 - won - lost], 1000)
        return float(np.mean([decides(wins, losses, size) for wins, losses, _ in draws.tolist()]))

    assert 0.72 < share(needed) < 0.95 or lost == 0.0
    assert share(needed // 4) < 0.72


@given(st.integers(0, 40), st.integers(0, 40), st.integers(100, 1000))
def test_an_undecided_run_needs_more_than_it_has(wins: int, losses: int, n: int) -> None:
    if not decides(wins, losses, n):
        assert significance.examples_needed(wins, losses, n, MARGIN) > n


def test_few_examples_without_a_change_ask_for_hundreds_more() -> None:
    assert 500 < significance.examples_needed(0, 0, 100, MARGIN) < 1500
