"""What a task hands to the runner: a prompt, what is right, and how that is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixquant.evaluate.engine import Message, TokenIds

Checker = Callable[[str, Any], bool]
"""From a model's text and the right answer to whether the text is right."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """Example `index` of a data seed, on one rung of a task's ladder.

    rung: place on the ladder, 0 where a task has just one. label: what the rung is, for people. answer: what `check`
    compares with. reference: a full right answer where one is known: it sets the limit, and serves as a draft.
    limit: longest answer in tokens; None means the reference's length and a little more, or the suite's default.
    ids: the prompt as the model reads it, once somebody had to know; tokenizing is most of what an example costs.
    """

    task: str
    rung: int = 0
    label: str = ""
    seed: int = 0
    index: int
    prompt: str | list[Message]
    answer: Any
    check: Checker
    reference: str | None = None
    limit: int | None = None
    ids: TokenIds | None = None

    def is_right(self, text: str) -> bool:
        return self.check(text, self.answer)
