"""Numbers as people read them."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mixquant.policy import ARMS
from mixquant.report import palette
from mixquant.report.charts import LINE_SPACING, _apart
from mixquant.report.numerals import date, duration, kld, p_value, percent, short_count, signed_points, within


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (percent(0.983, 0.005), "98.3 ± 0.5 %"),
        (percent(0.99962, 0.00021), "99.96 ± 0.02 %"),
        (percent(1.0), "100.0 %"),
        (percent(0.99981), "99.98 %"),
        (percent(None), "–"),
        (signed_points(-0.004), "−0.4"),
        (signed_points(0.0001), "0.0"),
        (kld(0.00331, 0.0009), "(3.3 ± 0.9) × 10⁻³"),
        (kld(0.00331, 0.00002), "(3.31 ± 0.02) × 10⁻³"),
        (kld(4.14, 0.2), "4.1 ± 0.2"),
        (kld(-2.5e-9), "−2.5 × 10⁻⁹"),
        (kld(3e-17), "0"),
        (kld(None), "–"),
        (within("times", 12.34, 0.0, 20.0), "12.3 [0.0, 20.0]"),
        (within("times", 0.0, 0.0, 1.0), "0.0 [0.0, 1.0]"),
        (within("kld", 3.31e-3, 2.4e-3, 4.2e-3), "3.3 [2.4, 4.2] × 10⁻³"),
        (within("percent", 0.98, 0.971, 0.99), "98.0 [97.1, 99.0] %"),
        (within("kld", 0.0, 0.0, 0.0), "0.0 [0.0, 0.0]"),
        (p_value(0.00012), "< 0.001"),
        (p_value(0.0123), "0.012"),
        (p_value(0.5), "0.50"),
        (short_count(310), "310"),
        (short_count(1536), "1.5K"),
        (within("kld", 3.31e-3, None, None), "3.3 × 10⁻³"),
        (duration(815.0), "13 min 35 s"),
        (duration(7384.0), "2 h 3 min"),
        (duration(9.4), "9 s"),
        (date(1795620142.07), "2026-11-25 15:22 UTC"),
    ],
)
def test_numbers(words: str, expected: str) -> None:
    assert words == expected


@pytest.mark.parametrize("wanted", [[0.0, 0.0, 0.0], [95.0, 99.0, 100.0], [50.0, 51.0, 10.0], [0.0, 50.0, 100.0]])
def test_words_at_the_ends_of_lines_keep_apart(wanted: list[float]) -> None:
    places = _apart({str(i): place for i, place in enumerate(wanted)}, height=100.0)
    found = sorted(places.values())
    assert all(b - a >= LINE_SPACING for a, b in pairwise(found))
    assert found[0] >= 0
    assert found[-1] <= 100
    assert sorted(places, key=lambda arm: places[arm]) == sorted(places, key=lambda arm: wanted[int(arm)])


def test_no_two_colours_are_equal_and_both_themes_have_all() -> None:
    assert palette.LIGHT.keys() == palette.DARK.keys() > palette.DASHES.keys() == {*ARMS, *palette.OTHERS}
    assert len(set(palette.LIGHT.values())) == len(palette.LIGHT)
