"""A question in text: what is asked, what is right, and how that is checked. No tokenizer is needed yet.

Tasks that are made on the spot, task files and lm-eval's tasks all give questions; `mixquant.evaluate.suites` measures
them for a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mixquant.prompts import Message, Prompt

Checker = Callable[[str, Any], bool]
"""From a model's text and the right answer to whether the text is right."""

_CALL = re.compile(r"\s*<tool_call>(.*)</tool_call>\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question.

    prompt: text, or a chat. answer: what `check` compares a text with. easier: a second reading of the same text that
    asks less, for models that `check` is too hard for. reference: a full right answer, or nothing: it sets the limit
    and serves as a draft. limit: longest answer in tokens, None for the reference's length and a little more. stops: an
    answer ends behind the first of these strings.
    """

    prompt: Prompt
    answer: Any
    check: Checker
    easier: Checker | None = None
    reference: str = ""
    limit: int | None = None
    stops: tuple[str, ...] = ()

    def is_right(self, text: str) -> bool:
        return self.check(text, self.answer)

    def is_nearly_right(self, text: str) -> bool | None:
        """By the easier reading; None where there is none."""
        return None if self.easier is None else self.easier(text, self.answer)


def worked(messages: list[Message], text: str, steps: list[str], answer: str) -> Question:
    """A user's question after `messages`, answered by written steps and a last line `answer: ...`."""
    return asked(messages, text, "\n".join([*steps, f"answer: {answer}"]), answer)


def asked(messages: list[Message], text: str, reference: str, answer: str) -> Question:
    """A user's question after `messages`; only the result of the reference is compared, not the steps before it."""
    prompt = [*messages, {"role": "user", "content": text}]
    return Question(prompt=prompt, answer=answer, check=states, reference=reference)


def states(text: str, answer: str) -> bool:
    """Whether a text ends in exactly this result."""
    return result(text) == answer


def result(text: str) -> str | None:
    """The result stated in a model's text: its tool call in canonical JSON, or its last line."""
    if call := _CALL.fullmatch(text):
        return _canonical(call[1])
    last = text.strip().rpartition("\n")[2]
    return last.removeprefix("answer: ") if last.startswith("answer: ") else None


def _canonical(text: str) -> str | None:
    try:
        return json.dumps(json.loads(text), sort_keys=True)
    except ValueError:
        return None
