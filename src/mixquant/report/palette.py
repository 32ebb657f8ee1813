"""One colour for each arm, everywhere, in light and in dark.

Colours from Okabe and Ito's set for colour-blind readers (blue against vermilion for the two arms that matter), darker
on light and lighter on dark, so that words in an arm's colour reach a contrast of 4.5. Lines also differ by their dash,
so colour is never the only sign. Charts are drawn in the light colours; `charts` then replaces each by its CSS
variable, which is why no two may be equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from mixquant.policy import ARMS

T = TypeVar("T")

LIGHT = {
    "paper": "#fcfbf8",
    "card": "#ffffff",
    "ink": "#1c2430",
    "muted": "#5a6473",
    "rule": "#e2dfd8",
    "grid": "#e9e6e0",
    "bf16": "#3a4350",
    "bf16-control": "#666f7c",
    "uniform": "#b54708",
    "phase": "#0a61ad",
    "decode-only": "#0b7a5b",
}
DARK = {
    "paper": "#14171c",
    "card": "#1b1f26",
    "ink": "#e8eaed",
    "muted": "#a2abb8",
    "rule": "#313742",
    "grid": "#2a2f38",
    "bf16": "#d3d8df",
    "bf16-control": "#8e97a5",
    "uniform": "#f2914a",
    "phase": "#6db4f5",
    "decode-only": "#4fc3a1",
}
Dash = str | tuple[float, tuple[float, ...]]

DASHES: dict[str, Dash] = {
    "bf16": "solid",
    "bf16-control": (0, (1, 1.6)),
    "uniform": (0, (6, 1.8)),
    "phase": "solid",
    "decode-only": (0, (4, 1.6, 1, 1.6)),
}


def items(arms: Mapping[str, T]) -> list[tuple[str, T]]:
    """What there is for each arm, in the arms' order."""
    return [(arm, arms[arm]) for arm in ARMS if arm in arms]


def css(colours: dict[str, str]) -> str:
    """The colours as CSS variables: `--phase: #0a61ad; ...`."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
