"""A task file: the user's own examples, one JSON object a line.

    {"prompt": "What is 6 times 7?", "answer": 42, "checker": "number"}
    {"prompt": [{"role": "user", "content": "..."}], "answer": "B", "checker": "choice", "max_tokens": 64}

prompt      text as it stands, or chat messages for the model's chat template
answer      what the checker compares with
checker     its name (`mixquant.evaluate.suites.checkers`)
max_tokens  longest answer in tokens; 256 by default, or the reference's length and a little more
reference   a right answer in full, if there is one

The task is called by the file's name without its ending. Its examples are run once, as data seed 0, however many seeds
a run has: they are what they are, and repeating them would make errors look smaller than they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixquant.errors import InputError
from mixquant.evaluate.items import Item
from mixquant.files import read_text
from mixquant.policy import choose_name
from mixquant.prompts import Message, parse_chat

from .checkers import KINDS, checker

KEYS = ("prompt", "answer", "checker", "max_tokens", "reference")
MAX_TOKENS = 256


def read(path: Path) -> list[Item]:
    """The examples of a task file in their order; InputError names the first bad line and what is wrong with it."""
    items: list[Item] = []
    for number, line in _lines(path):
        try:
            items.append(_item(path.stem, len(items), line))
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not items:
        raise InputError(
            f'{path} has no examples: give lines such as {{"prompt": ..., "answer": ..., "checker": ...}}.'
        )
    return items


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    text = read_text(path, "name a task file")
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _item(task: str, index: int, line: str) -> Item:
    row = _row(line)
    kind = KINDS[choose_name("checker", row["checker"], KINDS)]
    if not kind.fits(row["answer"]):
        raise InputError(
            f"checker {row['checker']} compares with {kind.wants}, not {row['answer']!r}: mend the answer."
        )
    return Item(
        task=task,
        index=index,
        prompt=row["prompt"],
        answer=row["answer"],
        check=checker(row["checker"]),
        reference=row.get("reference"),
        limit=row.get("max_tokens", None if row.get("reference") else MAX_TOKENS),
    )


def _row(line: str) -> dict[str, Any]:
    """A line's object, with every key known and of the right kind."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"not valid JSON ({error}): mend the line.") from None
    if not isinstance(row, dict):
        raise InputError('not a JSON object: give {"prompt": ..., "answer": ..., "checker": ...}.')
    for key in row:
        choose_name("key", key, KEYS)
    for key in ("prompt", "answer", "checker"):
        if key not in row:
            raise InputError(f'no "{key}": add it.')
    row["prompt"] = _prompt(row["prompt"])
    if type(limit := row.get("max_tokens", 1)) is not int or limit < 1:
        raise InputError(f"max_tokens is a number of tokens, 1 or more, not {limit!r}: mend it.")
    if not isinstance(row.get("reference", ""), str):
        raise InputError("the reference is no text: give a right answer in full, or leave it out.")
    return row


def _prompt(prompt: Any) -> str | list[Message]:
    if isinstance(prompt, list):
        return parse_chat(prompt, "the prompt").messages
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("the prompt is empty or no prompt: give text or a list of chat messages.")
    return prompt
