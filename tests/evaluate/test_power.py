"""The test itself tested: how often it calls nothing something (A/A), and a planted fault nothing (power).

A/A runs are resampled from answers in which no arm differs from any other: examples are drawn with replacement, and
arms change places at random within each. Whatever the resampling, "different" is then a false alarm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import pytest
from benchmarks.power import FAULTS, Suite, open_backend, power, sample, scores
from scipy.stats import binom

from mixquant.evaluate.comparison import ALPHA, Comparison, Scores, compare, decide

from .synthetic import Damage, records, run, summarized

RUNS = 1000
BOUND = binom.ppf(0.95, RUNS, ALPHA)
"""False alarms in 1,000 runs that a test with exactly this alpha exceeds in one of twenty sets."""

ARMS = ("bf16-control", "uniform", "phase", "decode-only")


def noise(examples: int) -> list[tuple[list[bool], list[float]]]:
    """For each example: whether five arms solve it (the reference last), and how far four of them are from it.

    Divergences span ten orders of magnitude, and one example in ten is on the verge of right and wrong.
    """
    rng = Random(0)
    rows = []
    for _ in range(examples):
        solved, verge, hardness = rng.random() < 0.7, rng.random() < 0.1, rng.lognormvariate(-20, 5)
        right = [rng.random() < 0.5 if verge else solved for _ in range(len(ARMS) + 1)]
        rows.append((right, [hardness * rng.lognormvariate(0, 1) for _ in ARMS]))
    return rows


def runs_without_a_difference(size: int) -> Iterator[list[Comparison]]:
    """All comparisons of a run of five arms, for `RUNS` resampled runs."""
    rng, pool = Random(1), noise(300)
    for _ in range(RUNS):
        drawn = [(rng.sample(right, 5), rng.sample(kld, 4)) for right, kld in rng.choices(pool, k=size)]
        arm = {
            name: Scores([right[i] for right, _ in drawn], [kld[i] for _, kld in drawn]) for i, name in enumerate(ARMS)
        }
        reference, control = Scores([right[4] for right, _ in drawn]), arm["bf16-control"]
        yield [
            compare(control, reference),
            *(compare(arm[name], reference, control) for name in ARMS[1:]),
            compare(arm["phase"], arm["uniform"]),
        ]


def test_a_run_without_a_difference_rarely_calls_one() -> None:
    """At most alpha of the runs; the same p-values without correction raise far more false alarms."""
    alarms = uncorrected = 0
    for comparisons in runs_without_a_difference(size=200):
        alarms += any(decision.different for decision in decide(comparisons))
        uncorrected += any(p is not None and p <= ALPHA for c in comparisons for p in (c.mcnemar_p, c.kld_p))
    assert 0 < alarms <= BOUND
    assert uncorrected > 2 * BOUND


def test_documents_without_a_difference_rarely_call_one() -> None:
    """The same through `summarize`, where every arm only has the control's damage."""
    damage = dict.fromkeys(ARMS, Damage(lost=0.05, won=0.05))
    alarms = 0
    for seed in range(100):
        rows = summarized(records(60, damage, seed), run(damage))["comparisons"]
        alarms += any(row["different"] for row in rows)
    assert alarms <= binom.ppf(0.95, 100, ALPHA)


def test_a_small_difference_everywhere_is_found_and_does_not_show_in_the_mean() -> None:
    """Why a sign test: divergences half as large again on every example, and a mean that a few of them rule."""
    rng, found, shown = Random(4), 0, 0
    for _ in range(RUNS):
        hardness = [rng.lognormvariate(-20, 5) for _ in range(200)]
        floor, arm = ([scale * h * rng.lognormvariate(0, 1) for h in hardness] for scale in (1.0, 1.5))
        comparison = compare(Scores([True] * 200, arm), Scores([True] * 200), Scores([True] * 200, floor))
        found += decide([comparison])[0].different
        shown += comparison.kld_low is not None and comparison.kld_low > 0
    assert found > 0.8 * RUNS
    assert shown < 0.2 * RUNS


STRONGEST, WEAKER = FAULTS[0], FAULTS[1]
"""Of the faults that act on an answer, by what benchmarks/power.py measured. The two weakest are no further off than
batch compositions where a CPU multiplies BF16 by AMX."""


@pytest.fixture(scope="module")
def measured() -> dict[str, Scores]:
    """The demo model's phase arm measured from itself: in two other batch compositions, and with planted faults."""
    suite = Suite(n=5)
    backend = open_backend()
    healthy = suite.logits(backend, "phase")
    return {
        "floor": scores(healthy, suite.logits(backend, "phase", batch=5, reverse=True)),
        "other floor": scores(healthy, suite.logits(backend, "phase", batch=3)),
        **{fault: scores(healthy, suite.logits(open_backend(fault), "phase")) for fault in (STRONGEST, WEAKER)},
    }


def itself(measured: dict[str, Scores]) -> Scores:
    return Scores(measured["floor"].right)


@pytest.mark.slow
def test_real_batch_compositions_are_no_difference(measured: dict[str, Scores]) -> None:
    """Two floors of the real engine, changing places at random."""
    rng, alarms = Random(2), 0
    pairs = list(zip(klds(measured["floor"]), klds(measured["other floor"]), strict=True))
    assert any(a != b for a, b in pairs)
    for _ in range(RUNS):
        drawn = [rng.sample(pair, 2) for pair in rng.choices(pairs, k=200)]
        arm, floor = (Scores([True] * 200, [pair[i] for pair in drawn]) for i in (0, 1))
        alarms += decide([compare(arm, Scores([True] * 200), floor)])[0].different
    assert alarms <= BOUND


def klds(column: Scores) -> Sequence[float]:
    assert column.kld is not None
    return column.kld


@pytest.mark.slow
@pytest.mark.parametrize("fault", [STRONGEST, WEAKER])
def test_a_planted_fault_is_found(measured: dict[str, Scores], fault: str) -> None:
    """+1 E4M3 code on 1 % of one layer's scales, at the size of a rung of the suite."""
    assert power(measured[fault], itself(measured), measured["floor"], 1000, Random(3)) >= 0.9
    assert power(measured[fault], itself(measured), measured["floor"], 3, Random(3)) == 0.0  # too few to tell


@pytest.mark.slow
def test_a_strong_fault_is_found_by_twenty_examples(measured: dict[str, Scores]) -> None:
    assert power(measured[STRONGEST], itself(measured), measured["floor"], 20, Random(3)) >= 0.9


def test_a_floor_is_needed(measured: dict[str, Scores]) -> None:
    """Without one nothing can be decided about a divergence, however large."""
    arm = sample(measured[STRONGEST], range(8))
    assert compare(arm, Scores(arm.right)).kld_p is None
