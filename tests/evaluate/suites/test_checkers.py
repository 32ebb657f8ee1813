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
    "boxed": (
        [
            ("so \\boxed{42}", 42), ("\\boxed{\\frac{1}{2}}", "0.5"), ("\\boxed{\\dfrac12}", "\\frac{1}{2}"),
            ("\\boxed{-\\tfrac{3}{4}}", "-3/4"), ("\\boxed{x = 5}", "5"), ("\\boxed{12\\text{ cm}}", "12"),
            ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\frac{\\pi}{2})"),
            ("\\boxed{\\text{Evelyn}}", "Evelyn"),
            ("\\boxed{1} no, \\boxed{\\frac{{2}}{3}}", "\\frac{{2}}{3}"), ("\\boxed{90^\\circ}", "90"),
            ("\\boxed{\\$1,000}", "1000"), ("\\boxed{025}", "25"),
            ("\\boxed{\\frac{\\dfrac{a}{b}}{c}}", "\\frac{\\frac{a}{b}}{c}"),
        ],
        [
            ("42", 42), ("\\boxed{41}", 42), ("\\boxed{42} then \\boxed{1}", 42), ("\\boxed{4", 4),
            ("\\boxed{1,2}", "12"), ("\\boxed{x+1}", "1+x"), ("\\boxed{}", "0"), ("\\boxed{\\frac{1}{0}}", "1"),
        ],
    ),
    "json": (
        [
            ('{"a": 1, "b": [2]}', {"b": [2], "a": 1}), ('Sure:\n```json\n[1, 2]\n```', [1, 2]),
            ('{"a": 0} then {"a": 1}', {"a": 1}), ("7", 7), ('<tool_call>{"a": "}"}</tool_call>', {"a": "}"}),
        ],
        [('{"a": 1}', {"a": 2}), ("[1, 2]", [2, 1]), ('{"a": 1', {"a": 1}), ("nothing", {}), ('{"a": 1} []', {"a": 1})],
    ),
    "calls": (
        [
            ('[{"name": "f", "arguments": {"x": 1}}]', [{"f": {"x": [1, 2], "y": ["", 3]}}]),
            ('{"name": "f", "arguments": {"x": 2.0, "y": 3}}', [{"f": {"x": [1, 2], "y": ["", 3]}}]),
            ('{"name": "g", "arguments": {"c": "new york,NY"}}', [{"g": {"c": ["New York, NY"]}}]),
            ('{"name": "f", "arguments": {}} {"name": "g", "arguments": {}}', [{"g": {}}, {"f": {}}]),
            ('{"name": "f", "arguments": {"o": {"min": 1}}}', [{"f": {"o": [{"min": [1], "max": [9, ""]}]}}]),
            ('{"name": "f", "arguments": {"l": ["a", "B"]}}', [{"f": {"l": [["A", "b"]]}}]),
            ("[]", []),
        ],
        [
            ('[{"name": "g", "arguments": {"x": 1}}]', [{"f": {"x": [1]}}]),
            ('[{"name": "f", "arguments": {"x": 3}}]', [{"f": {"x": [1, 2]}}]),
            ('[{"name": "f", "arguments": {}}]', [{"f": {"x": [1]}}]),
            ('[{"name": "f", "arguments": {"x": 1, "z": 1}}]', [{"f": {"x": [1]}}]),
            ('[{"name": "f", "arguments": {"x": true}}]', [{"f": {"x": [1]}}]),
            ('[{"name": "f", "arguments": {"x": "1"}}]', [{"f": {"x": [1]}}]),
            ('[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]', [{"f": {}}]),
            ('[{"name": "f", "arguments": {}}]', [{"f": {}}, {"f": {}}]),
            ('[{"name": "f", "arguments": {"l": ["b", "a"]}}]', [{"f": {"l": [["a", "b"]]}}]),
            ("call f()", [{"f": {}}]),
        ],
    ),
    "regex": (
        [("id 482-x", r"\d{3}-x"), ("Oslo", "(?i)oslo")],
        [("id 48-x", r"\d{3}-x"), ("", "a"), ("<think>aa</think>b", "a")],
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
        ("choice", "b"), ("boxed", ""), ("calls", {"f": {}}), ("calls", [{"f": {}, "g": {}}]), ("regex", "("),
        ("calls", [{"move": {"to": "oslo"}}]), ("calls", [{"move": {"to": 3}}]), ("calls", [{"move": {"to": []}}]),
        ("calls", [{"move": {"to": [{"city": "oslo"}]}}]),
        ("regex", 1),
    ],
)  # fmt: skip
def test_answers_that_a_checker_cannot_compare_with(name: str, answer: Any) -> None:
    assert not KINDS[name].fits(answer)


def test_every_checker_is_tested_and_an_unknown_one_is_refused() -> None:
    assert set(CASES) == set(KINDS)
    with pytest.raises(InputError, match="Unknown checker 'nmber': did you mean number"):
        checker("nmber")
