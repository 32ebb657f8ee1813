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
from mixquant.evaluate import RESULTS_VERSION

EACH = "*"
"""Key of a shape: every key of the object, whatever its name; there must be one."""

NUMBER = (int, float)
MAYBE = (int, float, type(None))


@dataclass(frozen=True)
class AtLeast:
    """Shape of a number that is not smaller."""

    low: float


@dataclass(frozen=True)
class IfThere:
    """Shape of what a key that may be missing holds."""

    shape: Any


_COUNT = AtLeast(1)
_SE = (None, AtLeast(0))
_INTERVALS = {"kld_mean": MAYBE, "kld_se": _SE}
_DIVERGENCE = {
    **_INTERVALS,
    **dict.fromkeys(["kld_median", "kld_p90", "kld_p99", "kld_p999", "kld_max", "same_top1", "same_top1_se"], MAYBE),
    **dict.fromkeys(["identical", "identical_se", "first_divergence_median", "length_ratio", "length_ratio_se"], MAYBE),
    "intervals": {"first_divergence_median": (None, [MAYBE])},
    "growth": (None, {"tokens": NUMBER, "examples": NUMBER, "ratio": MAYBE, "ratio_se": MAYBE}),
    "positions": NUMBER,
    "quantiles": [[NUMBER, NUMBER]],
    "survival": [[NUMBER, NUMBER]],
    "by_position": [{"start": NUMBER, "stop": NUMBER, **_INTERVALS, "flip_rate": MAYBE, "flip_rate_se": _SE}],
    "by_context": [{"start": NUMBER, "stop": NUMBER, **_INTERVALS}],
    "by_layer": IfThere([{"layer": str, **_INTERVALS, "sqnr_db": MAYBE}]),
}
_SCORE = {
    "accuracy": NUMBER,
    "se": MAYBE,
    "n": _COUNT,
    "recovery": MAYBE,
    "recovery_se": MAYBE,
    "flips": {"right_to_wrong": NUMBER, "wrong_to_right": NUMBER},
    "mcnemar_p": MAYBE,
    "seeds": {EACH: NUMBER},
}
_RUNG = {
    **{"rung": NUMBER, "label": str, "prompt_tokens": NUMBER, "n": _COUNT},
    **dict.fromkeys(["accuracy", "low", "high"], NUMBER),
    **_INTERVALS,
}
_ARM = {
    "emulated": bool,
    "kernels": {"prefill": [str], "decode": [str]},
    "divergence": (None, _DIVERGENCE),
    "tasks": {EACH: {**_SCORE, "rungs": [_RUNG, ...]}},
    "all": _SCORE,
}
RESULTS = {
    **dict.fromkeys(["mixquant", "engine", "device", "command", "format"], str),
    "model": {"name": str, "hash": IfThere((str, type(None)))},
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
            results.append(_checked(path, data, RESULTS, RESULTS_VERSION))
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

    A shape is a type, several types, `AtLeast` a number, a list with the shape of all items ([shape, ...] where there
    must be one) or of each, an object with shapes by key (more keys may be there, and those `IfThere` may be missing),
    or (None, shape) for what may be null.
    """
    if isinstance(shape, tuple) and shape[0] is None:
        return None if value is None else _mismatch(value, shape[1], where)
    if isinstance(shape, dict):
        return _object_mismatch(value, shape, where)
    if isinstance(shape, list):
        return _list_mismatch(value, shape, where)
    if isinstance(shape, AtLeast):
        small = isinstance(value, NUMBER) and value < shape.low
        return f"{where} is {value}" if small else _mismatch(value, NUMBER, where)
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
        optional = isinstance(inner, IfThere)
        if key not in value and not optional:
            return f"{place} is missing"
        if key in value and (problem := _mismatch(value[key], inner.shape if optional else inner, place)):
            return problem
    return None


def _list_mismatch(value: Any, shape: list[Any], where: str) -> str | None:
    if not isinstance(value, list):
        return f"{where} is not a list"
    if len(shape) == 1 or shape[1] is ...:
        if len(shape) == 2 and not value:
            return f"{where} is empty"
        shape = shape[:1] * len(value)
    if len(value) != len(shape):
        return f"{where} has {len(value)} items, not {len(shape)}"
    items = enumerate(zip(value, shape, strict=True))
    return next((problem for i, (item, inner) in items if (problem := _mismatch(item, inner, f"{where}[{i}]"))), None)
