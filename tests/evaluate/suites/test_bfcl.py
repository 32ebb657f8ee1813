"""BFCL as a ladder: each question once, right answers right, functions offered as the model's template takes them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from itertools import islice, pairwise
from typing import Any

import pytest

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.evaluate import suites
from mixquant.evaluate.suites import Amount, Capacity, bfcl
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.prompts import Chat, token_ids
from mixquant.tasks import Question

RUNGS = ["1 function", "4 functions", "16 functions", "40 functions", "multi-turn"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find("demo"))


@pytest.fixture(scope="module")
def some(tokenizer: Any) -> dict[str, list[Question]]:
    """Forty questions of each rung, for a model whose template takes tools."""
    return {label: list(islice(questions, 40)) for label, questions in bfcl.rungs(tokenizer).items()}


def first_right(answer: list[dict[str, Any]]) -> str:
    """The right calls, written with the first of the values that are right."""
    calls = [
        {"name": name, "arguments": {key: plain(values[0]) for key, values in arguments.items() if values[0] != ""}}
        for call in answer
        for name, arguments in call.items()
    ]
    return json.dumps(calls)


def plain(value: Any) -> Any:
    """Objects among right values list their own right values."""
    if isinstance(value, Mapping):
        return {key: plain(inner[0] if isinstance(inner, list) else inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def offered(question: Question) -> list[str]:
    assert isinstance(question.prompt, Chat)
    return [tool["function"]["name"] for tool in question.prompt.tools or []]


def test_every_question_is_on_one_rung(tokenizer: Any) -> None:
    ladder = bfcl.rungs(tokenizer)
    assert list(ladder) == RUNGS
    assert {label: len(list(questions)) for label, questions in ladder.items()} == {
        "1 function": 148, "4 functions": 466, "16 functions": 630, "40 functions": 667, "multi-turn": 200,
    }  # fmt: skip


@pytest.mark.parametrize("label", RUNGS)
def test_right_answers_are_right_and_others_are_not(some: dict[str, list[Question]], label: str) -> None:
    for question in some[label]:
        text = first_right(question.answer)
        assert question.is_right(text), text
        assert question.is_nearly_right(text)
        assert not question.is_right("[]")
        assert not question.is_right(text + text)
    right = [question.is_right(first_right(other.answer)) for question, other in pairwise(some[label])]
    assert sum(right) <= 1


@pytest.mark.parametrize(("label", "number"), [("1 function", 1), ("4 functions", 4), ("16 functions", 16)])
def test_a_rung_offers_its_number_of_functions_the_right_ones_among_them(
    some: dict[str, list[Question]], label: str, number: int
) -> None:
    for question in some[label]:
        assert len(set(offered(question))) == number
        assert {name for call in question.answer for name in call} <= set(offered(question))
    if number > 1:
        places = [offered(question).index(next(iter(question.answer[0]))) for question in some[label]]
        assert len(set(places)) > 2, "the right one stands anywhere"


def test_multi_turn_asks_a_turn_after_the_right_calls_of_those_before(some: dict[str, list[Question]]) -> None:
    roles = [[message["role"] for message in question.prompt.messages] for question in some["multi-turn"]]  # type: ignore[union-attr]
    assert all(role[-1] == "user" for role in roles)
    assert {role.count("user") for role in roles} >= {1, 2, 3}
    assert any("tool" in role for role in roles)
    assert {len(offered(question)) for question in some["multi-turn"]} <= set(range(17, 40))


def test_functions_are_tools_text_or_plain_as_the_template_allows(tokenizer: Any) -> None:
    def first() -> Question:
        return next(bfcl.rungs(other)["4 functions"])

    other = load_tokenizer(find("demo"))
    tools = first()
    other.chat_template = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    told = first()
    other.chat_template = None
    text = first()
    assert tools.answer == told.answer == text.answer
    assert isinstance(told.prompt, list)
    assert [message["role"] for message in told.prompt] == ["system", "user", "assistant", "user"]
    assert isinstance(text.prompt, str)
    assert text.prompt.endswith("\n\nAssistant: ")
    for name in offered(tools):
        assert f'"name": "{name}"' in told.prompt[0]["content"]
        assert f'"name": "{name}"' in text.prompt
        assert name in tokenizer.decode(token_ids(tokenizer, tools.prompt))


def test_schemas_have_the_names_of_json_schema(some: dict[str, list[Question]]) -> None:
    known = {"object", "array", "string", "number", "integer", "boolean"}

    def types(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(types, value)) if value else set()
        if not isinstance(value, dict):
            return set()
        own = {value["type"]} if isinstance(value.get("type"), str) else set()
        return own.union(*map(types, value.values()))

    chats = [question.prompt for questions in some.values() for question in questions]
    assert set().union(*(types(chat.tools) - {"function"} for chat in chats if isinstance(chat, Chat))) <= known


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_rung_by_rung(tokenizer: Any) -> None:
    data = suites.read(["bfcl"], tokenizer, lambda name: pytest.fail(name))
    chosen = suites.load(["bfcl"], data, Amount([0], 2), Capacity(tokenizer, 1500))
    assert Counter(item.place.label for item in chosen.items) == {"1 function": 2, "4 functions": 2}
    assert any(note.startswith("bfcl, 40 functions: left out ") for note in chosen.notes)
    assert chosen.notes[-1] == f"bfcl: {bfcl.NOTE}"


def test_a_missing_package_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bfcl_eval", None)  # as where it is missing
    with pytest.raises(InputError, match=r"bfcl-eval .*pip install --no-deps bfcl-eval"):
        bfcl.rungs(tokenizer)
