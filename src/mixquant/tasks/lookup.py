"""Look-up: read a field of several records, then sort what was read.

    user       Sort qty of 482, 193, 720.
    assistant  482.qty=637
               193.qty=904
               720.qty=137
               answer: 137,637,904

The look-ups are written out; the sorting is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from .question import Question, worked
from .transcript import Record, Transcript


def ask(rng: Random, transcript: Transcript, steps: int) -> Question:
    """Ask for `steps` quantities in ascending order."""
    return worked(transcript.messages, *sorting(rng.sample(transcript.records, steps)))


def sorting(rows: Sequence[Record]) -> tuple[str, list[str], str]:
    """The question about these records, the steps of its answer and the result."""
    lines = [f"{row.id}.qty={row.qty}" for row in rows]
    ordered = ",".join(str(qty) for qty in sorted(row.qty for row in rows))
    return f"Sort qty of {', '.join(row.id for row in rows)}.", lines, ordered
