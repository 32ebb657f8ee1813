"""How errors of quantization are told: as the share of a signal's power, and in decibels."""

from __future__ import annotations

import math


def sqnr(relative_error: float) -> float:
    """Signal-to-quantization-noise ratio in dB of a relative squared error; infinite without error."""
    return -10.0 * math.log10(relative_error) if relative_error > 0 else math.inf
