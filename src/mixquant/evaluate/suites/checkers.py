"""Whether a model's text is right: pure functions (text, answer) -> bool, by name.

    exact     the text is the answer; white space around both does not count
    contains  the answer's words stand in the text, in order; case and punctuation do not count
    number    the last number in the text is the answer
    choice    the text settles on the answer's letter, A to H
    json      the last JSON value in the text equals the answer
    regex     the answer, a regular expression, is found in the text
    calls     the text makes exactly the function calls of the answer, in any order (`calls`)
    names     it calls the functions of the same answer, whatever their arguments

They compare what a model says, not what it thinks: text up to a closing </think> does not count. They know no algebra
and ask no judge, so a right answer in unforeseen words counts as wrong, in every arm alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

from mixquant.policy import choose_name
from mixquant.tasks.question import Checker

from . import calls
from .json_values import json_values

_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_HUGE = re.compile(r"[eE][+-]?[\d_]{4}")  # 1e1000000000 takes all memory as a fraction
_CHOICE = re.compile(r"(?:(?i:answer|choice|option)\b(?:\s+is)?\W*|boxed\{)([A-H])\b")
_LETTER = re.compile(r"\W*([A-H])(?:[).:]|\W*$)")


class Kind(NamedTuple):
    """A way to check; `wants` says what its answers look like, `fits` whether one does."""

    check: Checker
    wants: str
    fits: Callable[[Any], bool]


def checker(name: str) -> Checker:
    """The checker of this name; InputError with the nearest valid one where there is none."""
    return partial(_check_spoken, KINDS[choose_name("checker", name, KINDS)].check)


def _check_spoken(check: Checker, text: str, answer: Any) -> bool:
    return check(text.rpartition("</think>")[2], answer)


def exact(text: str, answer: str) -> bool:
    return text.strip() == answer.strip()


def contains(text: str, answer: str) -> bool:
    return f" {_words(answer)} " in f" {_words(text)} "


def number(text: str, answer: str | float) -> bool:
    found = _NUMBER.findall(text)
    return bool(found) and _value(found[-1]) == _value(str(answer))


def choice(text: str, answer: str) -> bool:
    settled = _CHOICE.findall(text)
    first = _LETTER.match(text)
    return answer == (settled[-1] if settled else first and first[1])


def equal_json(text: str, answer: Any) -> bool:
    found = list(json_values(text))
    return bool(found) and bool(found[-1] == answer)


def regex(text: str, answer: str) -> bool:
    return re.search(answer, text) is not None


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _value(text: str) -> Fraction | str:
    """The number that a text writes, or the text itself."""
    if _HUGE.search(text):
        return text
    try:
        return Fraction(text.replace(",", "") if _NUMBER.fullmatch(text) else text)
    except (ValueError, ZeroDivisionError):
        return text


def _is_number(answer: Any) -> bool:
    return isinstance(answer, int | float | str) and isinstance(_value(str(answer)), Fraction)


def _is_regex(answer: Any) -> bool:
    try:
        return isinstance(answer, str) and re.compile(answer) is not None
    except re.error:
        return False


def _is_text(answer: Any) -> bool:
    return isinstance(answer, str) and bool(_words(answer))


_CALLS = 'a list of calls such as [{"area": {"base": [10]}}]'

KINDS = {
    "exact": Kind(exact, "a text", _is_text),
    "contains": Kind(contains, "a text", _is_text),
    "number": Kind(number, "a number", _is_number),
    "choice": Kind(choice, "a letter from A to H", lambda answer: answer in tuple("ABCDEFGH")),
    "json": Kind(equal_json, "a JSON value", lambda answer: True),
    "regex": Kind(regex, "a regular expression", _is_regex),
    "calls": Kind(calls.made, _CALLS, calls.is_answer),
    "names": Kind(calls.named, _CALLS, calls.is_answer),
}
