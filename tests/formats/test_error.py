"""Errors in decibels."""

from __future__ import annotations

import math

import pytest

from mixquant.formats.error import sqnr


def test_a_hundredth_is_twenty_decibels_and_nothing_lost_is_infinitely_many() -> None:
    assert sqnr(0.01) == pytest.approx(20.0)
    assert sqnr(0.0) == math.inf
