"""Function calls in a model's text: which are read, and which are right."""

from __future__ import annotations

from typing import Any

import pytest

from mixquant.evaluate.suites.calls import Call, is_answer, made, named, read

AREA = [{"geometry.area": {"base": [10, 10.0], "unit": ["cm", ""]}}]
TWO = [*AREA, {"mail": {"to": [["ann", "bob"]], "options": [{"fast": [True]}]}}]


@pytest.mark.parametrize(
    "text",
    [
        '[{"name": "geometry.area", "arguments": {"base": 10, "unit": "cm"}}]',
        '{"name": "geometry_area", "parameters": {"base": 10}}',
        '<tool_call>\n{"name": "geometry.area", "arguments": {"base": 10.0}}\n</tool_call>',
        'I will call it: [{"name": "geometry.area", "arguments": {"base": 10, "unit": " C-M "}}] now.',
        "[geometry.area(base=10, unit='cm')]",
        "geometry.area(base=10)",
    ],
)
def test_right_calls_in_every_form(text: str) -> None:
    assert made(text, AREA)
    assert named(text, AREA)


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        ('[{"name": "geometry.area", "arguments": {"base": 11}}]', True),
        ('[{"name": "geometry.area", "arguments": {"base": true}}]', True),
        ('[{"name": "geometry.area", "arguments": {}}]', True),
        ('[{"name": "geometry.area", "arguments": {"base": 10, "height": 5}}]', True),
        ('[{"name": "geometry.area", "arguments": {"base": 10, "unit": "m"}}]', True),
        ('[{"name": "geometry.area", "arguments": "10"}]', True),
        ('[{"name": "area", "arguments": {"base": 10}}]', False),
        ('[{"name": "geometry.area", "arguments": {"base": 10}}] [{"name": "geometry.area", "arguments": {}}]', False),
        ("geometry.area(base=size)", True),
        ("Call geometry.area with a base of 10.", True),
        ("geometry.areas", False),
        ("", False),
        ("[" * 5000, False),
    ],
)
def test_wrong_calls_and_what_they_still_name(text: str, is_named: bool) -> None:
    assert not made(text, AREA)
    assert named(text, AREA) == is_named


def test_several_calls_may_come_in_any_order_and_none_may_be_missing() -> None:
    area, mail = "geometry.area(base=10)", "mail(to=['Ann', 'BOB'], options={'fast': True})"
    assert made(f"[{area}, {mail}]", TWO)
    assert made(f"[{mail}, {area}]", TWO)
    assert not made(f"[{mail}]", TWO)
    assert not made(f"[{area}, {area}]", TWO)
    assert not made(f"[{mail}, {area}, {area}]", TWO)
    assert not made("[mail(to=['bob', 'ann'], options={'fast': True}), geometry.area(base=10)]", TWO)


def test_positional_arguments_stand_under_their_place() -> None:
    assert read("cd('docs', deep=True)") == [Call("cd", {"0": "docs", "deep": True})]


@pytest.mark.parametrize("answer", [{}, "x", [{}], [{"f": 1}], [{"f": {"a": 1}}], [{"f": {}, "g": {}}], [["f"]], None])
def test_what_says_no_calls(answer: Any) -> None:
    assert not is_answer(answer)
    assert is_answer(TWO)
