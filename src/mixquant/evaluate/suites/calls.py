"""Function calls in a model's text, and whether they are the right ones.

Read are the forms that models are taught: JSON objects with a name and arguments, alone, in a list or between
<tool_call> tags, and Python's own, `[area(base=10, height=5)]`.

What is right is said as the Berkeley Function Calling Leaderboard says it, one object a call:

    [{"area": {"base": [10], "height": [5], "unit": ["units", ""]}}]      the values that are right; "": may be missing

and compared as its AST checker does: texts without case, spaces and punctuation; no argument that is not listed; calls
in any order. `named` asks less: that the functions are the right ones, whatever their arguments, and where a text makes
no call at all, that it names them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .json_values import json_values

_PYTHON = re.compile(r"\[?\s*[A-Za-z_][\w.]*\s*\(.*\)\s*\]?", re.DOTALL)
_LOOSE = re.compile(r"[\s,./\-_*^'\"]")


class Call(NamedTuple):
    """One call; positional arguments stand under their place."""

    name: str
    arguments: Mapping[str, Any]


def made(text: str, answer: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text makes exactly the calls that are right."""
    left = list(read(text))
    if len(left) != len(answer):
        return False
    for wanted in answer:
        found = next((call for call in left if _is_right(call, wanted)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def named(text: str, answer: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a text calls the right functions, as often as is right, or names them without a call."""
    wanted = sorted(plain(name) for call in answer for name in call)
    if found := read(text):
        return sorted(plain(call.name) for call in found) == wanted
    return all(re.search(rf"\b{re.escape(name)}\b", plain(text)) for name in wanted)


def read(text: str) -> list[Call]:
    """The calls in a text, in their order; none where it makes none."""
    return list(_from_json(text)) or _from_python(text)


def plain(name: str) -> str:
    """Templates and servers that allow no dots in names make underscores of them."""
    return name.replace(".", "_")


def is_answer(answer: Any) -> bool:
    """Whether this says which calls are right."""
    return isinstance(answer, list) and all(
        isinstance(call, dict) and len(call) == 1 and all(map(_lists_values, call.values())) for call in answer
    )


def _lists_values(arguments: Any) -> bool:
    return isinstance(arguments, dict) and all(isinstance(values, list) for values in arguments.values())


def _from_json(text: str) -> Iterator[Call]:
    for value in json_values(text):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and isinstance(item.get("name"), str):
                arguments = item.get("arguments", item.get("parameters"))
                yield Call(item["name"], arguments if isinstance(arguments, dict) else {})


def _from_python(text: str) -> list[Call]:
    found = _PYTHON.search(text)
    try:
        body = ast.parse(found[0].strip(), mode="eval").body if found else None
        nodes = body.elts if isinstance(body, ast.List) else [body]
        return [_call(node) for node in nodes if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _call(node: ast.Call) -> Call:
    """ValueError for arguments that are no literals."""
    positional = {str(place): ast.literal_eval(value) for place, value in enumerate(node.args)}
    return Call(ast.unparse(node.func), positional | {k.arg or "**": ast.literal_eval(k.value) for k in node.keywords})


def _is_right(call: Call, wanted: Mapping[str, Any]) -> bool:
    ((name, arguments),) = wanted.items()
    return plain(call.name) == plain(name) and _all_right(call.arguments, arguments)


def _all_right(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    if not found.keys() <= wanted.keys():
        return False
    return all(_among(found[key], values) if key in found else "" in values for key, values in wanted.items())


def _among(value: Any, right: Any) -> bool:
    return any(_equal(value, wanted) for wanted in (right if isinstance(right, list) else [right]))


def _equal(value: Any, wanted: Any) -> bool:
    """1 is 1.0 and no True; objects list their right values themselves."""
    if isinstance(value, str) and isinstance(wanted, str):
        return _LOOSE.sub("", value).casefold() == _LOOSE.sub("", wanted).casefold()
    if isinstance(value, dict) and isinstance(wanted, dict):
        return _all_right(value, wanted)
    if isinstance(value, list | tuple) and isinstance(wanted, list | tuple):
        return len(value) == len(wanted) and all(map(_equal, value, wanted))
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)
