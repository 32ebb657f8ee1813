"""A task file: the user's own examples, one JSON object a line.

    {"prompt": "What is 6 times 7?", "answer": 42, "checker": "number"}
    {"prompt": [{"role": "user", "content": "..."}], "answer": "B", "checker": "choice", "max_tokens": 64}

prompt      text as it stands, or chat messages for the model's chat template
answer      what the checker compares with
checker     its name (`mixquant.evaluate.suites.checkers`)
max_tokens  longest answer in tokens; 256 by default, or the reference's length and a little more
reference   a right answer in full, if there is one

A bad line is refused by its number, with the reason, before anything runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixquant.errors import InputError
from mixquant.files import parse_json, read_text
from mixquant.policy import choose_name
from mixquant.prompts import Message, encodes, parse_chat
from mixquant.tasks import Question

from .checkers import KINDS, checker

KEYS = ("prompt", "answer", "checker", "max_tokens", "reference")


def read(path: Path) -> list[Question]:
    """The questions of a task file in their order; InputError names the first bad line and what is wrong with it."""
    lines = enumerate(read_text(path, "name a task file").split("\n"), start=1)
    questions = [_question(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    if not questions:
        raise InputError(
            f'{path} has no examples: give lines such as {{"prompt": ..., "answer": ..., "checker": ...}}.'
        )
    return questions


def _question(where: str, line: str) -> Question:
    row = parse_json(line, where, "mend the line")
    try:
        _check(row)
        return Question(
            prompt=_prompt(row["prompt"]),
            answer=row["answer"],
            check=checker(row["checker"]),
            reference=row.get("reference", ""),
            limit=row.get("max_tokens"),
        )
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _check(row: Any) -> None:
    """Raises InputError unless a line holds the keys it must, all of them known and of the right kind."""
    if not isinstance(row, dict):
        raise InputError('not a JSON object: give {"prompt": ..., "answer": ..., "checker": ...}.')
    for key in row:
        choose_name("key", key, KEYS)
    for key in ("prompt", "answer", "checker"):
        if key not in row:
            raise InputError(f'no "{key}": add it.')
    if type(limit := row.get("max_tokens", 1)) is not int or limit < 1:
        raise InputError(f"max_tokens is a number of tokens, 1 or more, not {limit!r}: mend it.")
    if not isinstance(row.get("reference", ""), str):
        raise InputError("the reference is no text: give a right answer in full, or leave it out.")
    kind = KINDS[choose_name("checker", row["checker"], KINDS)]
    if not kind.fits(row["answer"]):
        raise InputError(
            f"checker {row['checker']} compares with {kind.wants}, not {row['answer']!r}: mend the answer."
        )
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError:  # no answer equals NaN, so all would be wrong
        raise InputError("NaN and Infinity are no values of JSON: mend the line.") from None
    if not encodes(text):
        raise InputError("half a character (a lone \\ud800 or the like) is no text: mend the line.")


def _prompt(prompt: Any) -> str | list[Message]:
    if isinstance(prompt, list):
        return parse_chat(prompt, "the prompt").messages
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("the prompt is empty or no prompt: give text or a list of chat messages.")
    return prompt
