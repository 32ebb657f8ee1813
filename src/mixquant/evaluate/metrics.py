"""Pure measures of how far one model's answers are from another's, each with its uncertainty.

The unit is the *example*: the tokens of one answer depend on each other, so every standard error here counts examples
as independent, and never tokens. Whether a difference is real is decided in `mixquant.significance`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Interval = tuple[float, float]
"""Lower and upper end of a 95 % confidence interval."""

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution: half the width of a 95 % interval, in standard errors."""


@dataclass(frozen=True)
class Estimate:
    """A figure over independent units, its standard error (NaN for fewer than two units), and their number."""

    mean: float
    se: float
    n: int

    @property
    def interval(self) -> Interval:
        """95 % confidence interval, normal approximation; the ends are NaN where the standard error is."""
        return self.mean - Z * self.se, self.mean + Z * self.se

    def __str__(self) -> str:
        return f"{self.mean:.2e} ± {self.se:.0e}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error (sample standard deviation / sqrt n) of independent values."""
    return ratio(values, [1.0] * len(values))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Sum of the numerators over the sum of the denominators; each pair belongs to one example.

    The standard error is that of the ratio estimator (Cochran, Sampling Techniques, 6.4): of the residuals
    numerator - ratio * denominator. All denominators 1 make it the mean and its standard error. NaN where the
    denominators sum to 0.
    """
    n, total = len(denominators), math.fsum(denominators)
    if not total:
        return Estimate(math.nan, math.nan, n)
    mean = math.fsum(numerators) / total
    if n < 2:
        return Estimate(mean, math.nan, n)
    squares = math.fsum((a - mean * b) ** 2 for a, b in zip(numerators, denominators, strict=True))
    return Estimate(mean, math.sqrt(squares * n / (n - 1)) / abs(total), n)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) at each position, in nats: logits [positions, vocabulary] twice -> float64 [positions].

    The direction is llama.cpp's: how surprised `other` leaves a reader of the reference model.
    """
    p = reference.double().log_softmax(-1)
    q = other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def quantile(ordered: Sequence[float], q: float) -> float:
    """Quantile of ascending values, linear between order statistics (llama.cpp's and NumPy's default)."""
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    share = place - below
    if not share:
        return ordered[below]
    return (1 - share) * ordered[below] + share * ordered[below + 1]


def quantile_interval(groups: Sequence[Sequence[float]], ordered: Sequence[float], q: float) -> Interval:
    """95 % interval of a quantile of values that come in groups (the positions of one answer).

    Woodruff's: the share of values up to the quantile has a standard error over the groups; its interval is read
    off the quantile function. ordered: all values of all groups, ascending. NaN for a single group.
    """
    value = quantile(ordered, q)
    below = ratio([sum(x <= value for x in group) for group in groups], [len(group) for group in groups])
    if math.isnan(below.se):
        return math.nan, math.nan
    reach = Z * below.se
    return quantile(ordered, max(0.0, q - reach)), quantile(ordered, min(1.0, q + reach))


def first_divergence(answer: Sequence[int], reference: Sequence[int]) -> int | None:
    """Index of the first token that differs, or at which only one of the two goes on; None for identical answers."""
    for index, (token, expected) in enumerate(zip(answer, reference, strict=False)):
        if token != expected:
            return index
    return None if len(answer) == len(reference) else min(len(answer), len(reference))


def survival(divergences: Sequence[int | None], longest: int) -> list[tuple[int, float]]:
    """Steps (tokens, share of the answers identical to the reference's in their first `tokens` tokens).

    divergences: `first_divergence` of each answer. longest: tokens of the longest answer, where the curve ends.
    An answer that ended identical stays so.
    """
    n = len(divergences)
    ends = sorted(first + 1 for first in divergences if first is not None)
    drops = {tokens: 1 - count / n for count, tokens in enumerate(ends, start=1)}
    return sorted({0: 1.0, longest: 1 - len(ends) / n, **drops}.items())
