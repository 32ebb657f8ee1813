"""The tasks that are made on the spot, rung by rung: the agent ladder and long-context retrieval."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from mixquant import tasks
from mixquant.evaluate.items import Item
from mixquant.prompts import Tokenizer
from mixquant.tasks import retrieval
from mixquant.tasks.question import result

LADDERS = (*tasks.LADDER, "retrieval")


class Rung(NamedTuple):
    """One degree of difficulty.

    make: an example from the tokenizer, a data seed and an index. prompt, context: tokens of the prompt alone and with
    its answer where they are promised, 0 where only measuring tells.
    """

    label: str
    make: Callable[[Tokenizer, int, int], Item]
    prompt: int = 0
    context: int = 0


def rungs(task: str) -> list[Rung]:
    """A task's ladder, from the easiest rung to the hardest."""
    if task == "retrieval":
        return [_retrieval(place, length) for place, length in enumerate(retrieval.LENGTHS)]
    return [_agent(task, place, *rung) for place, rung in enumerate(tasks.LADDER[task])]


def _agent(task: str, place: int, steps: int, records: int) -> Rung:
    label = f"{steps} {'step' if steps == 1 else 'steps'}, {records} records"

    def make(tokenizer: Tokenizer, seed: int, index: int) -> Item:
        example = tasks.generate(task, place, seed, index)
        return Item(
            task=task, rung=place, label=label, seed=seed, index=index, prompt=example.messages,
            answer=example.answer, check=_states, reference=example.reference,
        )  # fmt: skip

    return Rung(label, make)


def _retrieval(place: int, length: int) -> Rung:
    label = f"{length >> 20}M tokens" if length >= 1 << 20 else f"{length >> 10}K tokens"

    def make(tokenizer: Tokenizer, seed: int, index: int) -> Item:
        haystack = retrieval.generate(tokenizer, length, seed, index)
        return Item(
            task="retrieval", rung=place, label=label, seed=seed, index=index, prompt=haystack.messages,
            answer=haystack.answer, check=_ends_in, reference=haystack.reference, limit=retrieval.ANSWER_TOKENS,
        )  # fmt: skip

    return Rung(label, make, length - retrieval.ANSWER_TOKENS, length)


def _states(text: str, answer: str) -> bool:
    return result(text) == answer


def _ends_in(text: str, answer: str) -> bool:
    """Whether the numbers after the last "answer" are the right ones: a chat model may set them in its own way."""
    return re.findall(r"\d+", text.casefold().rpartition("answer")[2]) == answer.split(",")
