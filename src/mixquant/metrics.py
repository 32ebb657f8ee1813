"""Pure measures of how far one model's answers are from another's, each with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over independent units, its standard error (NaN for fewer than two units), and their number."""

    mean: float
    se: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2e} ± {self.se:.0e}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error (sample standard deviation / sqrt n) of independent values."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Estimate(mean, math.nan, n)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, math.sqrt(variance / n), n)


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) at each position, in nats: logits [positions, vocabulary] twice -> float64 [positions].

    The direction is llama.cpp's: how surprised `other` leaves a reader of the reference model.
    """
    p = reference.double().log_softmax(-1)
    q = other.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
