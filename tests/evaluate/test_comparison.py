"""What `compare` counts, on which side, and what `decide` corrects for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.evaluate.comparison import ALPHA, Scores, compare, decide

N = 40
RIGHT = [True] * N
LOW, HIGH = Scores(RIGHT, [1e-6] * N), Scores(RIGHT, [1e-3] * N)
REFERENCE = Scores(RIGHT)


def test_flips_are_counted_from_the_other_arm_to_this_one() -> None:
    arm, against = Scores([True, False, False, True]), Scores([True, True, True, False])
    found = compare(arm, against)
    assert (found.right_to_wrong, found.wrong_to_right) == (2, 1)
    assert found.accuracy_difference == -0.25
    assert found.low < -0.25 < found.high


def test_against_the_reference_only_further_than_the_floor_counts() -> None:
    above, below = compare(HIGH, REFERENCE, LOW), compare(LOW, REFERENCE, HIGH)
    assert above.kld_p == 2.0**-N
    assert below.kld_p == 1.0
    assert above.kld_difference == pytest.approx(1e-3 - 1e-6)
    assert [d.different for d in decide([above])] == [True]
    assert [d.different for d in decide([below])] == [False]


def test_between_arms_both_directions_count() -> None:
    assert compare(LOW, HIGH).kld_p == compare(HIGH, LOW).kld_p == 2 * 2.0**-N
    assert (compare(LOW, HIGH).kld_further, compare(HIGH, LOW).kld_further) == (0.0, 1.0)


def test_the_other_arm_is_the_baseline_before_any_floor() -> None:
    assert compare(HIGH, HIGH, LOW).kld_difference == 0.0


def test_ties_say_nothing() -> None:
    still = compare(LOW, REFERENCE, LOW)
    assert (still.kld_further, still.kld_p) == (None, 1.0)
    some = Scores(RIGHT, [1e-3] * 10 + [1e-6] * (N - 10))
    assert compare(some, REFERENCE, LOW).kld_further == 1.0
    assert compare(some, REFERENCE, LOW).kld_p == 2.0**-10


@pytest.mark.parametrize(("arm", "floor"), [(HIGH, None), (REFERENCE, LOW), (REFERENCE, None)])
def test_without_a_baseline_nothing_is_said_of_divergence(arm: Scores, floor: Scores | None) -> None:
    found = compare(arm, REFERENCE, floor)
    assert found.kld_difference is found.kld_further is found.kld_p is None
    assert decide([found])[0].kld_p_holm is None


def test_more_comparisons_ask_for_more() -> None:
    """Six examples lost and none won: enough alone (p = 0.031), and not as one of several."""
    lost = compare(Scores([False] * 6 + [True] * 34), REFERENCE)
    still = compare(REFERENCE, REFERENCE)
    assert decide([lost])[0].different
    assert not decide([lost, still])[0].different
    assert decide([lost, still])[0].mcnemar_p_holm == pytest.approx(2 * lost.mcnemar_p)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_changing_places_changes_signs(rows: list[tuple[bool, bool, float, float]]) -> None:
    a = Scores([row[0] for row in rows], [row[2] for row in rows])
    b = Scores([row[1] for row in rows], [row[3] for row in rows])
    there, back = compare(a, b), compare(b, a)
    assert there.accuracy_difference == -back.accuracy_difference
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert (there.mcnemar_p, there.kld_p) == (back.mcnemar_p, back.kld_p)
    first, second = decide([there, back])
    assert (first.mcnemar_p_holm, first.kld_p_holm) == (second.mcnemar_p_holm, second.kld_p_holm)
    assert first.different == second.different
    assert first.different == (min(d for d in (there.mcnemar_p, there.kld_p) if d is not None) <= ALPHA / 4)
