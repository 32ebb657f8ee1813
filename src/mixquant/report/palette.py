"""One colour for each arm, everywhere, in light and in dark.

Colours from Okabe and Ito's set for colour-blind readers (blue against vermilion for the two arms that matter), darker
on light and lighter on dark, so that words in an arm's colour reach a contrast of 4.5. Lines also differ by their dash,
so colour is never the only sign. Arms that have no name of their own take the colours of `OTHERS`, in their order.
Charts are drawn in the light colours; `charts` then replaces each by its CSS variable: no two may be equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from mixquant.policy import ARMS

T = TypeVar("T")

COLOURS = {
    "paper": ("#fcfbf8", "#14171c"),
    "card": ("#ffffff", "#1b1f26"),
    "ink": ("#1c2430", "#e8eaed"),
    "muted": ("#5a6473", "#a2abb8"),
    "rule": ("#e2dfd8", "#313742"),
    "grid": ("#e9e6e0", "#2a2f38"),
    "bf16": ("#3a4350", "#d3d8df"),
    "bf16-control": ("#666f7c", "#8e97a5"),
    "uniform": ("#b54708", "#f2914a"),
    "phase": ("#0a61ad", "#6db4f5"),
    "decode-only": ("#0b7a5b", "#4fc3a1"),
    "other-1": ("#8a3d77", "#d99bc9"),
    "other-2": ("#7a5c00", "#d9b84f"),
    "other-3": ("#a3123f", "#f48aa6"),
    "other-4": ("#3f6b1f", "#a5cc7f"),
    "other-5": ("#5b4db3", "#b1a6f0"),
    "other-6": ("#00707d", "#6fcad4"),
}
"""On light and on dark."""

LIGHT = {name: light for name, (light, _) in COLOURS.items()}
DARK = {name: dark for name, (_, dark) in COLOURS.items()}
OTHERS = [name for name in LIGHT if name.startswith("other-")]

Dash = str | tuple[float, tuple[float, ...]]

DASHES: dict[str, Dash] = {
    "bf16": "solid",
    "bf16-control": (0, (1, 1.6)),
    "uniform": (0, (6, 1.8)),
    "phase": "solid",
    "decode-only": (0, (4, 1.6, 1, 1.6)),
    **dict.fromkeys(OTHERS, (0, (2.5, 1.2))),
}


def items(arms: Mapping[str, T]) -> list[tuple[str, T]]:
    """What there is for each arm: first those that have names of their own, in their order."""
    return [(arm, arms[arm]) for arm in (*ARMS, *(arm for arm in arms if arm not in ARMS)) if arm in arms]


def names(arms: Iterable[str]) -> dict[str, str]:
    """The colour of each arm, by its name here."""
    others = [arm for arm in dict.fromkeys(arms) if arm not in ARMS]
    return {arm: arm for arm in ARMS} | {arm: OTHERS[i % len(OTHERS)] for i, arm in enumerate(others)}


def css(colours: dict[str, str]) -> str:
    """The colours as CSS variables: `--phase: #0a61ad; ...`."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())
