"""Function calling with real functions: the Berkeley Function Calling Leaderboard (BFCL v4), as a ladder.

    1, 4, 16, 40 functions     single questions, one right call; the functions of other questions fill up the number
    multi-turn                 one turn of a dialogue with one or two APIs, 17 to 39 functions; the calls before it are
                               the right ones

Each question stands on one rung only, so examples stay independent: those of `simple_python`, `live_simple`, `multiple`
and `live_multiple` are dealt out in a fixed order to the rungs that hold their own functions, and of each dialogue of
`multi_turn_base` one turn is asked. What the tools of a dialogue returned is not in the data; they say `done`.

Functions are passed as tools where the model's chat template takes them. Other chat models are told of them in the
system prompt, with one example of a call, and models without a template in plain text. Right is the call with its
arguments (`calls.made`); the easier reading is that the right function is named (`calls.named`). These are our prompts
and our checker, so scores compare arms here and are none of the leaderboard's.

The data is that of the installed package `bfcl-eval`, whose code is never imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from mixquant.errors import InputError
from mixquant.files import parse_json, read_text
from mixquant.packages import folder
from mixquant.prompts import Chat, Message, Prompt, Tokenizer, plain, render
from mixquant.tasks import Question

from . import calls

FUNCTIONS = (1, 4, 16, 40)
"""How many functions a rung offers."""

SINGLE = ("simple_python", "live_simple", "multiple", "live_multiple")
SHORT = ("simple_python", "multiple")
"""Whose functions fill up: the live ones' documents are several times as long."""
TURNS = "multi_turn_base"
APIS = {
    "GorillaFileSystem": "gorilla_file_system", "MathAPI": "math_api", "MessageAPI": "message_api",
    "TicketAPI": "ticket_api", "TradingBot": "trading_bot", "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api", "VehicleControlAPI": "vehicle_control",
}  # fmt: skip
"""The file of each API's functions."""

LONGEST_ANSWER = 96
"""Tokens: the longest right call of the ladder has about 80."""

NOTE = "Right is the call with its arguments; prompts and checker are mixquant's, so these are no leaderboard scores."

FORM = (
    "You can call functions. Answer with the calls that the request needs, as a JSON list and nothing else: "
    '[{"name": "function_name", "arguments": {"argument": "value"}}]\nThese are the functions:\n'
)
EXAMPLE: list[Message] = [
    {"role": "user", "content": "What is 3 plus 4?"},
    {"role": "assistant", "content": '[{"name": "add", "arguments": {"a": 3, "b": 4}}]'},
]
"""What small models need to see; its function is not on offer."""

_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
"""BFCL's names of JSON schema's types."""

Function = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """What is asked, the functions on offer, and the calls that are right."""

    messages: list[Message]
    functions: Sequence[Function]
    answer: list[dict[str, Any]]


def rungs(tokenizer: Tokenizer) -> dict[str, Iterator[Question]]:
    """The ladder's questions by rung, made as they are asked for. InputError where bfcl-eval is not installed."""
    data = folder("bfcl_eval") / "data"
    ladder = {f"{n} function{'s' * (n != 1)}": cases for n, cases in _single(data).items()}
    ladder["multi-turn"] = _turns(data)
    takes_tools = _takes_tools(tokenizer)
    return {label: (_question(case, tokenizer, takes_tools) for case in cases) for label, cases in ladder.items()}


def _question(case: Case, tokenizer: Tokenizer, takes_tools: bool) -> Question:
    return Question(
        prompt=_prompt(case, tokenizer, takes_tools), answer=case.answer, check=calls.made, easier=calls.named,
        limit=LONGEST_ANSWER,
    )  # fmt: skip


def _prompt(case: Case, tokenizer: Tokenizer, takes_tools: bool) -> Prompt:
    if takes_tools:
        return Chat(case.messages, [{"type": "function", "function": function} for function in case.functions])
    said = FORM + "\n".join(json.dumps(function) for function in case.functions)
    messages = [{"role": "system", "content": said}, *EXAMPLE, *map(_told, case.messages)]
    if tokenizer.chat_template is not None:
        return messages
    return plain(messages)


def _told(message: Message) -> Message:
    """A message in words alone, for templates that know neither calls nor tools."""
    if message["role"] == "assistant":
        return {"role": "assistant", "content": json.dumps([call["function"] for call in message["tool_calls"]])}
    return {"role": "user", "content": message["content"]}


def _takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the chat template shows tools to the model."""
    if tokenizer.chat_template is None:
        return False
    tool = {"type": "function", "function": {"name": "tool_of_a_trial", "description": "", "parameters": {}}}
    try:
        return "tool_of_a_trial" in render(tokenizer, Chat([{"role": "user", "content": ""}], [tool]), "A trial")
    except InputError:
        return False


def _single(data: Path) -> dict[int, Iterator[Case]]:
    """By number of functions on offer; each question on one rung that holds its own functions."""
    rows = [row for name in SINGLE for row in _rows(data, name)]
    every = [function for row in rows for function in row["function"] if row["id"].startswith(SHORT)]
    Random("bfcl").shuffle(rows)
    dealt: dict[int, list[dict[str, Any]]] = {number: [] for number in FUNCTIONS}
    for place, row in enumerate(rows):
        if room := [number for number in FUNCTIONS if number >= len(row["function"])]:
            dealt[room[place % len(room)]].append(row)
    return {number: _cases(rows, every, number) for number, rows in dealt.items()}


def _cases(rows: Sequence[dict[str, Any]], every: Sequence[Function], number: int) -> Iterator[Case]:
    for row in rows:
        offered = _offered(row["function"], every, number, Random(row["id"]))
        yield Case(row["question"][0], [_schema(function) for function in offered], row["answer"])


def _offered(own: list[Function], every: Sequence[Function], number: int, rng: Random) -> list[Function]:
    """A question's functions and others, `number` of different names, in any order."""
    chosen = {calls.plain(function["name"]): function for function in own}
    while len(chosen) < number:
        other = rng.choice(every)
        chosen.setdefault(calls.plain(other["name"]), other)
    functions = list(chosen.values())
    rng.shuffle(functions)
    return functions


def _turns(data: Path) -> Iterator[Case]:
    """One turn of each dialogue, the first of one, the second of the next; those that call for nothing are left out."""
    for place, row in enumerate(_rows(data, TURNS)):
        functions = [
            _schema(function)
            for api in row["involved_classes"]
            for function in _lines(data / f"multi_turn_func_doc/{APIS[api]}.json")
            if function["name"] not in row.get("excluded_function", [])
        ]
        places = {function["name"]: list(function["parameters"]["properties"]) for function in functions}
        right = [[_written(text, places) for text in turn] for turn in row["answer"]]
        asked = place % len(right)
        if right[asked]:
            before = [m for turn in range(asked) for m in (*row["question"][turn], *_history(right[turn]))]
            answer = [{name: {key: [value] for key, value in args.items()}} for name, args in right[asked]]
            yield Case([*before, *row["question"][asked]], functions, answer)


def _history(right: Sequence[calls.Call]) -> list[Message]:
    """What the assistant called, and that it was done."""
    if not right:
        return []
    made = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in right]
    done = [{"role": "tool", "name": call.name, "content": "done"} for call in right]
    return [{"role": "assistant", "content": "", "tool_calls": made}, *done]


def _written(text: str, places: dict[str, list[str]]) -> calls.Call:
    """A right call, which is written in Python; its positional arguments get their names."""
    (call,) = calls.read(text)
    names = places.get(call.name, [])
    return calls.Call(call.name, {names[int(k)] if k.isdigit() else k: v for k, v in call.arguments.items()})


def _schema(function: Function) -> Function:
    """A function as JSON schema describes it, without what it returns."""
    kept = {key: function[key] for key in ("name", "description", "parameters")}
    described: Function = _renamed(kept)
    return described


def _renamed(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _TYPES.get(inner, inner) if key == "type" and isinstance(inner, str) else _renamed(inner)
            for key, inner in value.items()
        }
    return [_renamed(inner) for inner in value] if isinstance(value, list) else value


def _rows(data: Path, name: str) -> list[dict[str, Any]]:
    """A file's questions, each with its answer."""
    answers = {row["id"]: row["ground_truth"] for row in _lines(data / f"possible_answer/BFCL_v4_{name}.json")}
    return [row | {"answer": answers[row["id"]]} for row in _lines(data / f"BFCL_v4_{name}.json")]


@cache
def _lines(path: Path) -> list[dict[str, Any]]:
    text = read_text(path, "install another version of bfcl-eval")
    return [parse_json(line, path, "install another version of bfcl-eval") for line in text.splitlines() if line]
