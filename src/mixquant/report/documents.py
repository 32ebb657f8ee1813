"""Reading results and bench files: told apart by their keys, and checked against the shape that the report relies on.

A file that lacks something is refused with the place in it, so that nothing later meets a missing key.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixquant.errors import InputError

VERSION = 1
"""Of the results files that this release writes and reads."""

EACH = "*"
"""Key of a shape: every key of the object, whatever its name; there must be one."""

NUMBER = (int, float)
MAYBE = (int, float, type(None))

_INTERVALS = {"kld_mean": MAYBE, "kld_se": MAYBE}
_DIVERGENCE = {
    **_INTERVALS,
    **dict.fromkeys(["kld_median", "kld_p90", "kld_p99", "kld_p999", "kld_max", "same_top1", "same_top1_se"], MAYBE),
    **dict.fromkeys(["identical", "identical_se", "first_divergence_median", "length_ratio", "length_ratio_se"], MAYBE),
    "intervals": {"first_divergence_median": (None, [MAYBE])},
    "growth": (None, {"tokens": NUMBER, "examples": NUMBER, "ratio": MAYBE, "ratio_se": MAYBE}),
    "positions": NUMBER,
    "quantiles": [[NUMBER]],
    "survival": [[NUMBER]],
    "by_position": [{"start": NUMBER, "stop": NUMBER, **_INTERVALS, "flip_rate": MAYBE, "flip_rate_se": MAYBE}],
    "by_context": [{"start": NUMBER, "stop": NUMBER, **_INTERVALS}],
}
_SCORE = {
    "accuracy": NUMBER,
    "se": MAYBE,
    "n": NUMBER,
    "recovery": MAYBE,
    "recovery_se": MAYBE,
    "flips": {"right_to_wrong": NUMBER, "wrong_to_right": NUMBER},
    "mcnemar_p": MAYBE,
    "seeds": {},
}
_RUNG = {
    **{"rung": NUMBER, "label": str, "prompt_tokens": NUMBER, "n": NUMBER},
    **dict.fromkeys(["accuracy", "low", "high"], NUMBER),
    **_INTERVALS,
}
_ARM = {
    "emulated": bool,
    "kernels": {"prefill": [str], "decode": [str]},
    "divergence": (None, _DIVERGENCE),
    "tasks": {EACH: {**_SCORE, "rungs": [_RUNG]}},
    "all": _SCORE,
}
RESULTS = {
    **dict.fromkeys(["mixquant", "engine", "device", "command", "format"], str),
    "model": {"name": str},
    "versions": {},
    "tail": NUMBER,
    "seeds": [NUMBER],
    "margin": NUMBER,
    "prompt_tokens": {"min": MAYBE, "median": MAYBE, "max": MAYBE},
    "arms": {EACH: _ARM},
    "noise_floor": (None, dict.fromkeys(["accuracy", "flips", "kld_mean", "kld_p99", "same_top1", "identical"], MAYBE)),
    "comparisons": [
        {"arm": str, "against": str}
        | dict.fromkeys(["accuracy_difference", "low", "high", "mcnemar_p_holm"], NUMBER)
        | dict.fromkeys(["kld_difference", "kld_low", "kld_high", "kld_further", "kld_p_holm"], MAYBE)
        | {"kind": str}
    ],
    "verdict": {"sentence": str, "details": [str]},
}
BENCH = {
    "device": str,
    "rows": [
        {"engine": str, "arm": str, "isl": NUMBER, "cached": NUMBER, "batch": NUMBER}
        | {"ttft_ms": (None, {"p50": MAYBE, "p99": MAYBE}), "tpot_ms": MAYBE}
        | {"kernels": {"prefill": [str], "decode": [str]}}
    ],
}


@dataclass(frozen=True)
class Document:
    """A file's name and what it holds."""

    name: str
    data: dict[str, Any]


def read(paths: Sequence[Path]) -> tuple[list[Document], list[Document]]:
    """Results files and bench files, each in the order given."""
    results, benches = [], []
    for path in paths:
        data = _parse(path)
        if "verdict" in data or "arms" in data:
            results.append(_checked(path, data, RESULTS, VERSION))
            _check_arms(path, data["arms"])
        elif "rows" in data:
            benches.append(_checked(path, data, BENCH, None))
        else:
            raise InputError(f"{path} is not a results file: name one that `mixquant eval` or `mixquant bench` wrote.")
    return results, benches


def _parse(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a results file.") from None
    except ValueError:
        raise InputError(f"{path} is not JSON: name a results file that `mixquant eval` wrote.") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a results file: name one that `mixquant eval` or `mixquant bench` wrote.")
    return data


def _checked(path: Path, data: dict[str, Any], shape: dict[str, Any], version: int | None) -> Document:
    if version is not None and data.get("version") != version:
        raise InputError(
            f"{path} is of version {data.get('version')!r} and this mixquant reads version {version}: "
            "run `mixquant eval` again, or report it with the release that wrote it."
        )
    problem = _mismatch(data, shape, "")
    if problem:
        raise InputError(f"{path} is not whole ({problem}): run `mixquant eval` or `mixquant bench` again.")
    return Document(path.name, data)


def _check_arms(path: Path, arms: dict[str, Any]) -> None:
    """All arms have run the same tasks as the reference."""
    if "bf16" not in arms:
        raise InputError(f"{path} has no bf16 arm to compare with: run `mixquant eval` with bf16 among its arms.")
    for name, arm in arms.items():
        if arm["tasks"].keys() != arms["bf16"]["tasks"].keys():
            raise InputError(f"{path} has other tasks in arm {name} than in bf16: run `mixquant eval` again.")


def _mismatch(value: Any, shape: Any, where: str) -> str | None:
    """Where `value` departs from `shape`, in words; None if nowhere.

    A shape is a type, several types, a list with the shape of all items, an object with shapes by key (more keys may
    be there), or (None, shape) for what may be null.
    """
    if isinstance(shape, tuple) and shape[0] is None:
        return None if value is None else _mismatch(value, shape[1], where)
    if isinstance(shape, dict):
        return _object_mismatch(value, shape, where)
    if isinstance(shape, list):
        return _list_mismatch(value, shape[0], where)
    wrong_bool = isinstance(value, bool) and shape is not bool
    return None if isinstance(value, shape) and not wrong_bool else f"{where} is {json.dumps(value)[:40]}"


def _object_mismatch(value: Any, shape: dict[str, Any], where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where} is not an object"
    if EACH in shape:
        shape = dict.fromkeys(value, shape[EACH])
        if not value:
            return f"{where} is empty"
    for key, inner in shape.items():
        place = f"{where}.{key}" if where else key
        if key not in value:
            return f"{place} is missing"
        if problem := _mismatch(value[key], inner, place):
            return problem
    return None


def _list_mismatch(value: Any, shape: Any, where: str) -> str | None:
    if not isinstance(value, list):
        return f"{where} is not a list"
    return next((problem for i, item in enumerate(value) if (problem := _mismatch(item, shape, f"{where}[{i}]"))), None)
