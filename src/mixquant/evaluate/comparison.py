"""Is the difference between two arms real? Two paired tests an arm, corrected together.

What is tested. *Correctness*: of the examples that only one of the two arms solves, does one arm solve more (McNemar)?
*Divergence*: on how many examples is the arm further from the reference than its baseline is? The baseline is the
other arm, where that has a distance too: is phase closer to BF16 than uniform? Against the reference itself it is the
noise floor: how far BF16 is from BF16 in another batch composition. Only "further than the floor" counts there, so
that test is one-sided: an arm that happens to share the reference's batches may well be closer.

Why this holds alpha. Both are exact sign tests (`mixquant.significance`), with no assumption on the size of a
difference. An arm without a real difference answers like the control: example by example, either of the two is as
likely to be the further one. Where neither moves at all (most examples, on kernels that do not mind their batch), the
example is a tie and says nothing, so fewer false alarms are raised than alpha allows. All tests of a run are corrected
together (Holm): alpha bounds the chance that a run without a real difference calls anything different. Holm spends
little here: the tests on divergence mostly reject at once, and leave alpha to those on correctness.

Why it has power. An error in the arithmetic moves nearly all examples a little, and a count of examples sees that
however small it is beside the largest of them. It cannot see through another error: a fault inside a quantized arm
drowns in the format's own distance from BF16. To find it, make the healthy arm the reference and the healthy arm in
another batch composition the floor; `compare` does not know its arms' names (benchmarks/power.py measures both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixquant.evaluate.metrics import estimate
from mixquant.evaluate.significance import holm, paired_share_interval, sign_test

ALPHA = 0.05
"""Chance that a run without any real difference calls something different."""


@dataclass(frozen=True)
class Scores:
    """One arm's results, example by example, in the same order for all arms.

    right: whether the answer is right. kld: mean KL divergence from the reference over the answer's positions, in
    nats; None for the reference itself and where it was not measured.
    """

    right: Sequence[bool]
    kld: Sequence[float] | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm minus another, with 95 % intervals.

    right_to_wrong: examples that `against` solves and the arm does not. kld_difference: mean over examples of the
    arm's divergence minus its baseline's. kld_further: share of the examples on which it is larger, ties left out,
    None where all tie. All kld_* are None where there is no baseline. *_holm: p-values corrected for all tests of the
    run (`decide`); different: whether one of them is significant.
    """

    n: int
    accuracy_difference: float
    low: float
    high: float
    right_to_wrong: int
    wrong_to_right: int
    mcnemar_p: float
    kld_difference: float | None = None
    kld_low: float | None = None
    kld_high: float | None = None
    kld_further: float | None = None
    kld_p: float | None = None
    mcnemar_p_holm: float = 1.0
    kld_p_holm: float | None = None
    different: bool = False


def compare(arm: Scores, against: Scores, floor: Scores | None = None) -> Comparison:
    """Compare two arms on the same examples.

    floor: what an arm without a difference looks like, the baseline of the divergence where `against` is the
    reference, whose own divergence is None.
    """
    lost = sum(b and not a for a, b in zip(arm.right, against.right, strict=True))
    won = sum(a and not b for a, b in zip(arm.right, against.right, strict=True))
    n = len(arm.right)
    low, high = paired_share_interval(won, lost, n)
    return Comparison(
        n=n, accuracy_difference=(won - lost) / n, low=low, high=high,
        right_to_wrong=lost, wrong_to_right=won, mcnemar_p=sign_test(won, lost),
        **_compare_divergence(arm, against, floor),
    )  # fmt: skip


def _compare_divergence(arm: Scores, against: Scores, floor: Scores | None) -> dict[str, Any]:
    baseline = floor.kld if against.kld is None and floor is not None else against.kld
    if arm.kld is None or baseline is None:
        return {}
    differences = [a - b for a, b in zip(arm.kld, baseline, strict=True)]
    further, closer = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    mean = estimate(differences)
    low, high = mean.interval
    return {
        "kld_difference": mean.mean,
        "kld_low": low,
        "kld_high": high,
        "kld_further": further / (further + closer) if further + closer else None,
        "kld_p": sign_test(further, closer, one_sided=against.kld is None),
    }


def decide(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Which of a run's comparisons show a real difference: all their tests together, at `ALPHA`."""
    adjusted = iter(holm([p for c in comparisons for p in (c.mcnemar_p, c.kld_p) if p is not None]))
    decided = []
    for comparison in comparisons:
        mcnemar = next(adjusted)
        kld = None if comparison.kld_p is None else next(adjusted)
        different = mcnemar <= ALPHA or (kld is not None and kld <= ALPHA)
        decided.append(replace(comparison, mcnemar_p_holm=mcnemar, kld_p_holm=kld, different=different))
    return decided
