"""What counts as right: each checker on right texts, on wrong ones, and on texts that only look right."""

from __future__ import annotations

from typing import Any

import pytest

from mixquant.errors import InputError
from mixquant.evaluate.suites.checkers import KINDS, checker

CASES: dict[str, tuple[list[tuple[str, Any]], list[tuple[str, Any]]]] = {
    "exact": (
        [("oslo", "oslo"), ("  oslo\n", "oslo"), ("<think>riga?</think>\noslo", "oslo")],
        [("Oslo", "oslo"), ("oslo.", "oslo"), ("", "oslo"), ("in oslo", "oslo")],
    ),
    "contains": (
        [("It was Oslo, Norway.", "oslo norway"), ("a café", "Café"), ("**Blue-green**", "blue green")],
        [("oslofjord", "oslo"), ("norway oslo", "oslo norway"), ("<think>oslo</think> riga", "oslo"), ("", "x")],
    ),
    "number": (
        [
            ("6 x 7 = 42", 42), ("so $1,234.50.", "1234.5"), ("42.0", 42), ("it is -3", -3), ("10-3=7", "7"),
            ("about 1,234,567 people", "1,234,567"), ("\\boxed{18}", 18),
        ],
        [("42 of 43", 42), ("3", -3), ("none", 0), ("1,23", 123), ("<think>42</think>", 42), ("7-3", -3)],
    ),
    "choice": (
        [
            ("B", "B"), ("(B)", "B"), ("B. because", "B"), ("The correct answer is (C).", "C"), ("Answer: **D**", "D"),
            ("The answer is A. No: the answer is B", "B"), ("so \\boxed{C}", "C"), ("option A", "A"),
        ],
        [("A cat", "A"), ("The answer is Apple", "A"), ("A or B", "B"), ("b", "B"), ("", "A"), ("(B)", "A")],
    ),
    "json": (
        [
            ('{"a": 1, "b": [2]}', {"b": [2], "a": 1}), ('Sure:\n```json\n[1, 2]\n```', [1, 2]),
            ('{"a": 0} then {"a": 1}', {"a": 1}), ("7", 7), ('<tool_call>{"a": "}"}</tool_call>', {"a": "}"}),
        ],
        [('{"a": 1}', {"a": 2}), ("[1, 2]", [2, 1]), ('{"a": 1', {"a": 1}), ("nothing", {}), ('{"a": 1} []', {"a": 1})],
    ),
    "regex": (
        [("id 482-x", r"\d{3}-x"), ("Oslo", "(?i)oslo")],
        [("id 48-x", r"\d{3}-x"), ("", "a"), ("<think>aa</think>b", "a")],
    ),
    "calls": (
        [('{"name": "f", "arguments": {"a": 1}}', [{"f": {"a": [1, 2]}}]), ("<think>g()</think>[f(a=2)]", [{"f": {"a": [2]}}])],
        [("f(a=3)", [{"f": {"a": [1, 2]}}]), ("<think>f(a=1)</think>", [{"f": {"a": [1]}}]), ("", [{"f": {}}])],
    ),
    "names": (
        [("f(a=3)", [{"f": {"a": [1, 2]}}]), ("call f", [{"f": {}}])],
        [("g(a=1)", [{"f": {"a": [1]}}]), ("<think>f(a=1)</think>", [{"f": {"a": [1]}}])],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "answer"), [(n, *case) for n, (right, _) in CASES.items() for case in right])
def test_right(name: str, text: str, answer: Any) -> None:
    assert KINDS[name].fits(answer)
    assert checker(name)(text, answer) is True


@pytest.mark.parametrize(("name", "text", "answer"), [(n, *case) for n, (_, wrong) in CASES.items() for case in wrong])
def test_wrong(name: str, text: str, answer: Any) -> None:
    assert checker(name)(text, answer) is False


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("exact", 5), ("exact", " "), ("contains", "..."), ("number", "many"), ("number", None), ("choice", "AB"),
        ("choice", "b"), ("regex", "("), ("regex", 1), ("number", "1e1000000000"), ("number", "1e1_000_000_000"),
    ],
)  # fmt: skip
def test_answers_that_a_checker_cannot_compare_with(name: str, answer: Any) -> None:
    assert not KINDS[name].fits(answer)


def test_every_checker_is_tested_and_an_unknown_one_is_refused() -> None:
    assert set(CASES) == set(KINDS)
    with pytest.raises(InputError, match="Unknown checker 'nmber': did you mean number"):
        checker("nmber")
