"""What `benchmarks/pair.py` measured, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]

LINES = (
    ("first token, alone", "first_ms", "alone", "prompt"),
    ("... until it is read", "read_ms", "alone", "prompt"),
    ("... from then on", "hand_over_ms", "alone", "prompt"),
    ("decode step, batch", "gap_ms", "decode", "batch"),
    ("first token", "first_ms", "load", "load"),
    ("gap between tokens", "gap_ms", "load", "load"),
)
"""Of the table's rows: a title, the figure, the kind of row, and what it is for."""


def tables(facts: Row, rows: Sequence[Row]) -> list[str]:
    """The figures by arm, what they mean for a pair, transfers, whether tokens were right, and what failed."""
    arms = list(dict.fromkeys(row["arm"] for row in rows if "arm" in row))
    head = [f"{facts['machine']}; ms, median / 99th percentile / maximum", ""]
    table = ["| | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|", *_lines(arms, rows)]
    said = [*_verdicts(rows), *_transfers(rows), *_equal(rows)]
    return [*head, *table, "", *said, *(f"- failed: {what}: {why}" for what, why in facts["failed"].items())]


def _lines(arms: Sequence[str], rows: Sequence[Row]) -> Iterator[str]:
    for title, key, kind, label in LINES:
        for value in dict.fromkeys(row[label] for row in rows if row["kind"] == kind):
            found = [_pick(rows, kind, arm, label, value).get(key) for arm in arms]
            if any(found):
                yield f"| {title}: {value} | " + " | ".join(map(_cell, found)) + " |"
            if (kind, key) == ("load", "gap_ms"):
                speeds = [f"{1e3 / gap['mean']:.0f}" if gap else "–" for gap in found]
                yield f"| tokens a second of one answer: {value} | " + " | ".join(speeds) + " |"


def _pick(rows: Sequence[Row], kind: str, arm: str, label: str, value: Any) -> Row:
    return next((row for row in rows if (row["kind"], row.get("arm"), row.get(label)) == (kind, arm, value)), {})


def _cell(found: dict[str, float] | None) -> str:
    return f"{found['p50']:.1f} / {found['p99']:.1f} / {found['max']:.1f}" if found else "–"


def _verdicts(rows: Sequence[Row]) -> Iterator[str]:
    """When a pair pays: its figures over those of two engines, load by load."""
    for load in dict.fromkeys(row["load"] for row in rows if row["kind"] == "load"):
        pair = _pick(rows, "load", "pair", "load", load)
        for other in ("2 x mixquant", "2 x BF16"):
            engines = _pick(rows, "load", other, "load", load)
            if pair.get("gap_ms") and engines.get("gap_ms"):
                ratios = [pair[key][at] / engines[key][at] for key in ("first_ms", "gap_ms") for at in ("p50", "p99")]
                first, slow_first, gap, slow_gap = (f"{ratio:.2f}" for ratio in ratios)
                yield (
                    f"- {load}: a pair takes {first} times {other}'s first token (99th percentile: {slow_first}) and "
                    f"{gap} times its gap ({slow_gap})"
                )


def _transfers(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if "transfer_ms" in row:
            speed = row["transfer_mb"] / row["transfer_ms"]
            yield (
                f"- {row['arm']}, {row.get('prompt', row.get('load'))}: {row['transfer_mb']:.0f} MB by NIXL in "
                f"{row['transfer_ms']:.1f} ms ({speed:.0f} GB/s), on average"
            )


def _equal(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["kind"] == "same":
            yield (
                f"- prompt of {row['prompt']}: {row['equal']} of {row['of']} first tokens as one mixquant engine's, "
                "whose nested weights have other FP8 codes"
            )
