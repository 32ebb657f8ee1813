"""The tasks that are made on the spot, rung by rung: the agent ladder and long-context retrieval."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mixquant import tasks
from mixquant.prompts import Tokenizer
from mixquant.tasks import Question, retrieval

LADDERS = (*tasks.LADDER, "retrieval")


class Rung(NamedTuple):
    """One degree of difficulty.

    ask: a question from the tokenizer, a data seed and an index. prompt, context: tokens of the prompt alone and with
    its answer where they are promised, 0 where only measuring tells.
    """

    label: str
    ask: Callable[[Tokenizer, int, int], Question]
    prompt: int = 0
    context: int = 0


def rungs(task: str) -> list[Rung]:
    """A task's ladder, from the easiest rung to the hardest."""
    if task == "retrieval":
        return [_retrieval(length) for length in retrieval.LENGTHS]
    return [_agent(task, difficulty) for difficulty in tasks.LADDER[task]]


def _agent(task: str, difficulty: tasks.Difficulty) -> Rung:
    steps = "1 step" if difficulty.steps == 1 else f"{difficulty.steps} steps"

    def ask(tokenizer: Tokenizer, seed: int, index: int) -> Question:
        return tasks.generate(task, difficulty, seed, index)

    return Rung(f"{steps}, {difficulty.records} records", ask)


def _retrieval(length: int) -> Rung:
    def ask(tokenizer: Tokenizer, seed: int, index: int) -> Question:
        return retrieval.generate(tokenizer, length, seed, index)

    label = f"{length >> 20}M tokens" if length >= 1 << 20 else f"{length >> 10}K tokens"
    return Rung(label, ask, length - retrieval.ANSWER_TOKENS, length)
