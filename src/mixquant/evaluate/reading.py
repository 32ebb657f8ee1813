"""Reading a results file: the typed document, or one sentence that names the file, the place in it and the remedy.

Nothing that a file can hold is a traceback: types, numbers out of range, missing keys, nesting without end and bytes
that are no text are all found by the document's own types, and put into words here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mixquant.errors import InputError
from mixquant.evaluate.results import VERSION, Results
from mixquant.policy import REFERENCE


def read(path: Path) -> Results:
    """A results file; InputError with one sentence that names the file, the place in it and the remedy."""
    try:
        results = Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a results file.") from None
    except ValidationError as error:
        raise InputError(f"{path} {_problem(error.errors(include_url=False))}") from None
    if problem := next(_contradictions(results), None):
        raise InputError(f"{path} {problem}")
    return results


def _contradictions(results: Results) -> Iterator[str]:
    """What each key allows and all of them together do not."""
    if REFERENCE not in results.arms:
        yield f"has no {REFERENCE} arm to compare with: run `mixquant eval` with {REFERENCE} among its arms."
        return
    for name, arm in results.arms.items():
        if arm.tasks.keys() != results.reference.tasks.keys():
            yield f"has other tasks in arm {name} than in {REFERENCE}: run `mixquant eval` again."
    for pair in results.comparisons:
        for name in {pair.arm, pair.against} - results.arms.keys():
            yield f"compares an arm {_shown(name)} that is not in it: run `mixquant eval` again."


def _problem(errors: Sequence[ErrorDetails]) -> str:
    """The first thing that is wrong with a file, the most telling first."""
    found = {error["loc"]: error for error in errors}
    missing = {place for place, error in found.items() if error["type"] == "missing"}
    if errors[0]["type"] == "json_invalid":
        return "is not JSON: name a results file that `mixquant eval` wrote."
    if () in found or {("arms",), ("verdict",)} <= missing:
        return "is not a results file: name one that `mixquant eval` wrote."
    if error := found.get(("version",)):
        version = None if error["type"] == "missing" else error["input"]
        return (
            f"is of version {_shown(version)} and this mixquant reads version {VERSION}: "
            "run `mixquant eval` again, or report it with the release that wrote it."
        )
    return f"is not whole ({_place(errors[0]['loc'])} {_fault(errors[0])}): run `mixquant eval` again."


_NOT = {"model_type": "an object", "dict_type": "an object", "list_type": "a list", "tuple_type": "a list"}


def _fault(error: ErrorDetails) -> str:
    kind, value = error["type"], error["input"]
    if kind == "missing":
        return "is missing"
    if kind in _NOT:
        return f"is not {_NOT[kind]}"
    if kind == "too_short":
        return "is empty"
    if kind == "too_long":
        return f"has {len(value)} items, not {error['ctx']['max_length']}"
    return f"is {_shown(value)}"


def _place(location: Sequence[str | int]) -> str:
    """('arms', 'phase', 'by_position', 0) -> 'arms.phase.by_position[0]'."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")


def _shown(value: Any) -> str:
    """A value as JSON writes it, cut to what a sentence bears."""
    return json.dumps(value, default=str)[:40]
