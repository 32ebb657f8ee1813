"""Numbers as people read them: two or three digits that mean something, a real minus sign, and "–" for none."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime

from mixquant.evaluate.results import Kernels

NONE = "–"
LOWEST_KLD = 1e-12
"""Nats below which a divergence is rounding: what float64 leaves of two equal softmaxes."""

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def percent(share: float | None, se: float | None = None) -> str:
    """0.983, 0.005 -> '98.3 ± 0.5 %'; more decimals, up to four, where one would say 100, 0 or no error."""
    if share is None:
        return NONE
    smallest = min(value for value in (abs(share), abs(1 - share), se, 1) if value)
    digits = min(max(math.ceil(-math.log10(200 * smallest)), 1), 4)
    error = "" if se is None else f" ± {100 * se:.{digits}f}"
    return f"{100 * share:.{digits}f}{error} %"


def signed_points(difference: float | None) -> str:
    """A difference of two shares, in points: -0.004 -> '−0.4'."""
    if difference is None:
        return NONE
    words = f"{100 * difference:+.1f}"
    return "0.0" if words in ("+0.0", "-0.0") else words.replace("-", "−")


def kld(nats: float | None, se: float | None = None) -> str:
    """0.00331, 0.0009 -> '(3.3 ± 0.9) × 10⁻³'; what is only rounding is '0'. Differences have a sign."""
    if nats is None:
        return NONE
    if abs(nats) < LOWEST_KLD:
        return "0"
    scale, power = _scientific(nats)
    # up to the first digit of the standard error
    digits = min(max(math.ceil(math.log10(scale) - math.log10(se)), 1), 3) if se else 1
    mantissa = f"{nats / scale:.{digits}f}".replace("-", "−")
    if se is None:
        return mantissa + power
    both = f"{mantissa} ± {se / scale:.{digits}f}"
    return f"({both}){power}" if power else both


def within(unit: str, value: float, low: float | None, high: float | None) -> str:
    """A value with its interval, in one unit: '3.3 [2.4, 4.2] × 10⁻³', '98.3 [97.1, 99.0] %'; one example has none."""
    if low is None or high is None:
        return FORMATS[unit](value)
    scale, suffix = (0.01, " %") if unit == "percent" else (1.0, "")
    if unit == "kld" and abs(value) >= LOWEST_KLD:
        scale, suffix = _scientific(value)
    return f"{value / scale:.1f} [{low / scale:.1f}, {high / scale:.1f}]{suffix}".replace("-", "−")


def _scientific(value: float) -> tuple[float, str]:
    """The power of ten below a value, as a number and in words: 0.0033 -> (0.001, ' × 10⁻³')."""
    exponent = math.floor(math.log10(abs(value)))
    return 10.0**exponent, f" × 10{_raised(exponent)}" if exponent else ""


def power_of_ten(nats: float) -> str:
    """A tick of a logarithmic axis: 0.001 -> '10⁻³'."""
    return "10" + _raised(round(math.log10(nats)))


def p_value(p: float | None) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def count(n: float | None) -> str:
    """1024 -> '1,024'."""
    return NONE if n is None else f"{n:,.0f}"


def short_count(n: float) -> str:
    """A tick: 1024 -> '1K', 1536 -> '1.5K', 310 -> '310'."""
    return f"{n:.0f}" if n < 1000 else f"{n / 1024:.1f}".removesuffix(".0") + "K"


def decibels(db: float | None) -> str:
    return NONE if db is None else f"{db:.1f} dB"


def times(factor: float | None, se: float | None = None) -> str:
    """A factor with its standard error: 1.34, 0.02 -> '1.34 ± 0.02'."""
    if factor is None:
        return NONE
    digits = min(max(math.ceil(-math.log10(2 * se)), 2), 4) if se else 2
    return f"{factor:.{digits}f}" + ("" if se is None else f" ± {se:.{digits}f}")


def duration(seconds: float) -> str:
    """815.0 -> '13 min 35 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def date(started: float) -> str:
    """Seconds since 1970 -> '2026-11-27 05:40 UTC'."""
    return f"{datetime.fromtimestamp(started, UTC):%Y-%m-%d %H:%M} UTC"


def kernel_words(kernels: Kernels) -> str:
    """'prefill torch.scaled_mm.fp8, decode torch.linear'; one name where both phases run the same."""
    prefill, decode = (" + ".join(names) or "not known" for names in (kernels.prefill, kernels.decode))
    return prefill if prefill == decode else f"prefill {prefill}, decode {decode}"


def _raised(exponent: int) -> str:
    return str(exponent).translate(_RAISED)


FORMATS: dict[str, Callable[[float], str]] = {"percent": percent, "kld": kld, "count": count, "times": times}
"""Units of a chart's axis."""
