"""Synthetic agent tasks with a ladder of difficulty and exactly checkable answers.

    question = generate("arithmetic", rung=2, seed=0, index=17)
    question.prompt            chat messages
    question.reference         the full worked answer, for teacher forcing
    question.is_right(text)    whether a model's text ends in the right result

A question is a pure function of (task, rung, seed, index): no state, no files, no numpy.
A rung is a `Difficulty`: how many steps the answer takes and how many records the transcript
holds. `LADDER` goes from what the demo model always solves in BF16 to what it rarely does; it was
fixed on BF16 accuracy alone. The demo model was trained with at most 42 records, so the last two
rungs ask it to read beyond that. Training draws from another namespace of seeds
(`training/data.py`), so no question made here was ever trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from . import arithmetic, lookup, multihop, toolcall
from .question import Question
from .transcript import TOOLS, Transcript, build

__all__ = ["LADDER", "TASKS", "TOOLS", "Difficulty", "Question", "generate"]

TASKS: dict[str, Callable[[Random, Transcript, int], Question]] = {
    "lookup": lookup.ask,
    "multihop": multihop.ask,
    "arithmetic": arithmetic.ask,
    "toolcall": toolcall.ask,
}


class Difficulty(NamedTuple):
    """Of one rung: steps of the answer, records of the transcript."""

    steps: int
    records: int


LADDER: dict[str, tuple[Difficulty, ...]] = {
    task: tuple(Difficulty(*rung) for rung in rungs)
    for task, rungs in {
        "lookup": ((2, 8), (4, 16), (6, 24), (16, 40), (16, 60), (16, 72)),
        "multihop": ((3, 8), (6, 16), (10, 24), (16, 40), (16, 60), (16, 72)),
        "arithmetic": ((1, 8), (2, 16), (3, 24), (10, 40), (10, 56), (10, 60)),
        "toolcall": ((1, 8), (2, 16), (3, 24), (8, 40), (8, 60), (8, 72)),
    }.items()
}


def generate(task: str, rung: int | Difficulty, seed: int, index: int) -> Question:
    """Question `index` of a data seed; `rung` is a place on the task's ladder or a `Difficulty`."""
    difficulty = rung if isinstance(rung, Difficulty) else LADDER[task][rung]
    rng = Random(f"{task}/{difficulty.steps}/{difficulty.records}/{seed}/{index}")
    transcript = build(rng, difficulty.records)
    return TASKS[task](rng, transcript, difficulty.steps)
