"""Whether a difference is real: exact paired tests, their correction, intervals, and how many examples it would take.

One test decides everything here, the *exact sign test*. Two arms answer the same examples; on some of them one is
better (right where the other is wrong; closer to the reference), on some the other, the rest are ties and say nothing.
If there is no difference, each example that is no tie falls to either side like a coin. On correctness this is
McNemar's exact test. On divergence it asks no more than it must: KL divergences of one run span ten orders of
magnitude, so a few examples are their mean, and a t-test of it has no power; Wilcoxon's signed ranks have the same
power as signs on values so skewed, and assume more. The price: damage to fewer examples than the coin itself scatters
is left to the means' intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from mixquant.evaluate.metrics import Interval, Z


def sign_test(more: int, less: int, one_sided: bool = False) -> float:
    """Exact p-value of `more` against `less` examples, ties left out: binomial with one half.

    Two-sided (McNemar's exact test, where the counts are the two kinds of flips) or one-sided (that there are more).
    """
    n = more + less
    if one_sided:
        return _upper_tail(more, n)
    return min(1.0, 2 * _upper_tail(max(more, less), n))


def _upper_tail(k: int, n: int) -> float:
    """P(X >= k) for X binomial(n, 1/2): a sum of binomial coefficients in whole numbers, rounded once."""
    term = total = 1
    for i in range(n, k, -1):
        term = term * i // (n - i + 1)  # C(n, i) -> C(n, i - 1)
        total += term
    return total / (1 << n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: their family-wise error is held whatever their dependence."""
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def wilson(successes: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share; it stays inside [0, 1] and has a width where all or none succeed."""
    share, weight = successes / n, Z * Z / n
    centre = (share + weight / 2) / (1 + weight)
    reach = Z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return max(0.0, centre - reach), min(1.0, centre + reach)


def paired_share_interval(wins: int, losses: int, n: int) -> Interval:
    """95 % interval of the difference of two paired shares, (wins - losses) / n.

    Bonett and Price's (2012): Wald's with one more example of either kind, so that it has a width where no example
    changed sides. Fagerland, Lydersen and Laake (2014) recommend it.
    """
    changed, difference = (wins + losses + 2) / (n + 2), (wins - losses) / (n + 2)
    reach = Z * math.sqrt((changed - difference**2) / (n + 2))
    return max(-1.0, difference - reach), min(1.0, difference + reach)


def examples_needed(wins: int, losses: int, n: int, margin: float) -> int:
    """Examples at which a run with these rates decides, four times out of five, whether a difference is 0 or a margin.

    (wins - losses) / n is the difference of two paired shares. A run decides where its interval leaves out 0 or
    -margin; what is further from the difference seen is left out first (halfway between them, this asks for too many).
    """
    difference = (wins - losses) / n
    distance = max(abs(difference), abs(difference + margin)) / (Z + NormalDist().inv_cdf(0.8))
    changed = (wins + losses + 0.5) / (n + 1)  # not zero, however few examples there were
    # where the reach of `paired_share_interval`, sqrt(changed * m + 2) / m of m examples, comes down to the distance
    return math.ceil((changed + math.sqrt(changed**2 + 8 * distance**2)) / (2 * distance**2))
