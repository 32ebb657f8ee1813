"""What a task family makes from a transcript: a question, its worked answer and the result."""

from __future__ import annotations

import json
import re
from typing import NamedTuple

_CALL = re.compile(r"\s*<tool_call>(.*)</tool_call>\s*", re.DOTALL)


class Question(NamedTuple):
    """A user's question; `reference` is the full text of a right answer, `answer` its result."""

    text: str
    reference: str
    answer: str


def worked(text: str, steps: list[str], answer: str) -> Question:
    """A question answered by written steps and a last line `answer: ...`."""
    return Question(text, "\n".join([*steps, f"answer: {answer}"]), answer)


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
