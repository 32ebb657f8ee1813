"""Synthetic agent tasks with a ladder of difficulty and exactly checkable answers.

    example = generate("arithmetic", rung=2, seed=0, index=17)
    example.messages     the prompt, for a chat template
    example.reference    the full worked answer, for teacher forcing
    check(example, text) whether a model's text ends in the right result

An example is a pure function of (task, rung, seed, index): no state, no files, no numpy.
A rung is (steps, records): how many steps the answer takes and how many records the transcript
holds. `LADDER` goes from what the demo model always solves in BF16 to what it rarely does; it was
fixed on BF16 accuracy alone. The demo model was trained with at most 42 records, so the last two
rungs ask it to read beyond that. Training draws from another namespace of seeds
(`training/data.py`), so no example made here was ever trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from . import arithmetic, lookup, multihop, toolcall
from .question import Question, result
from .transcript import TOOLS, Message, Transcript, build

__all__ = ["LADDER", "TASKS", "TOOLS", "Example", "Rung", "check", "generate"]

TASKS: dict[str, Callable[[Random, Transcript, int], Question]] = {
    "lookup": lookup.ask,
    "multihop": multihop.ask,
    "arithmetic": arithmetic.ask,
    "toolcall": toolcall.ask,
}


class Rung(NamedTuple):
    """One degree of difficulty."""

    steps: int
    records: int


LADDER: dict[str, tuple[Rung, ...]] = {
    "lookup": (Rung(2, 8), Rung(4, 16), Rung(6, 24), Rung(16, 40), Rung(16, 60), Rung(16, 72)),
    "multihop": (Rung(3, 8), Rung(6, 16), Rung(10, 24), Rung(16, 40), Rung(16, 60), Rung(16, 72)),
    "arithmetic": (Rung(1, 8), Rung(2, 16), Rung(3, 24), Rung(10, 40), Rung(10, 56), Rung(10, 60)),
    "toolcall": (Rung(1, 8), Rung(2, 16), Rung(3, 24), Rung(8, 40), Rung(8, 60), Rung(8, 72)),
}


@dataclass(frozen=True)
class Example:
    """A prompt, its worked answer (`reference`) and the result it must end in (`answer`)."""

    task: str
    rung: Rung
    seed: int
    index: int
    messages: list[Message]
    reference: str
    answer: str


def generate(task: str, rung: int | Rung, seed: int, index: int) -> Example:
    """Example `index` of a data seed; `rung` is a place on the task's ladder or a `Rung`."""
    place = rung if isinstance(rung, Rung) else LADDER[task][rung]
    rng = Random(f"{task}/{place.steps}/{place.records}/{seed}/{index}")
    transcript = build(rng, place.records)
    question = TASKS[task](rng, transcript, place.steps)
    messages = [*transcript.messages, {"role": "user", "content": question.text}]
    return Example(task, place, seed, index, messages, question.reference, question.answer)


def check(example: Example, text: str) -> bool:
    """Whether `text` ends in exactly the right result; the steps before it are not compared."""
    return result(text) == example.answer
