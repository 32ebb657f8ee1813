"""The results of a benchmark: the one document that `mixquant bench` writes and `mixquant report` draws, typed.

Field names are the keys of the file. Times are milliseconds of this machine's clock. A row is one arm in one case: all
its turns, and their medians. Times are null where a kernel is emulated: they would say nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from mixquant.bench.arms import STOCK, TRANSFORMERS
from mixquant.errors import InputError
from mixquant.evaluate.results import YEAR_9999, Count, Figure, Kernels, Strict
from mixquant.policy import REFERENCE

KIND: Literal["bench"] = "bench"


class Times(Strict):
    """low, high: the smallest and the greatest; n: how many."""

    p50: Figure
    p99: Figure
    low: Figure
    high: Figure
    n: Count


class Row(Strict):
    """One arm in one case.

    isl: prompt tokens, `cached` of them in the prefix cache, `new` not; of a decode row, `new` is the prompt that
    somebody else's request brings meanwhile. ms: every turn's time until all first tokens are there, of a step, or of
    all conversations; rows are compared by it. ttft_ms: of each request, and of a decode row those that are read
    meanwhile; later_ttft_ms: of each but a conversation's first. tokens_per_s: written. ceiling_ms: what the products,
    attention and reads take at this device's own rates; ceiling_share: that over the median. session: engines that
    were resident together.
    """

    workload: str
    case: str
    arm: str
    engine: str
    model: str
    isl: Count
    cached: Count
    new: Count
    batch: Count
    ms: list[Figure]
    ttft_ms: Times | None
    later_ttft_ms: Times | None = None
    step_ms: Figure
    tokens_per_s: Figure = None
    hit_rate: Figure = None
    kernels: Kernels
    emulated: bool
    ceiling_ms: Figure = None
    ceiling_share: Figure = None
    session: int = 0

    @property
    def median(self) -> float | None:
        """Of the turns."""
        return statistics.median(ms for ms in self.ms if ms is not None) if self.ms else None


class Ratio(Strict):
    """An arm's time over another's: of the medians, and the smallest and greatest of turns that stood side by side."""

    workload: str
    case: str
    arm: str
    of: str
    time: Figure
    low: Figure
    high: Figure


class Engine(Strict):
    """What an arm's engine is, as far as it says; there may be more, such as `shape` and `rates` for the ceilings."""

    engine: str
    tail: Count | None = None
    graphs: str | None = None
    runner: str | None = None
    attention: list[str] = Field(default_factory=list)
    model_bytes: Count | None = None
    cache_tokens: Count | None = None
    start_s: Figure = None


class Results(Strict):
    """missing: arms that did not run, with the reason. engines: facts of each arm's engine."""

    kind: Literal["bench"] = KIND
    model: str
    dummy: bool
    device: str
    versions: dict[str, str]
    command: str
    commit: str | None = None
    started: Annotated[float, Field(ge=0, lt=YEAR_9999)] | None = None
    seconds: Figure = None
    arms: list[str]
    engines: dict[str, Engine]
    workloads: list[dict[str, Any]]
    rows: list[Row]
    ratios: list[Ratio]
    missing: dict[str, str]
    notes: list[str]

    @property
    def yardstick(self) -> str:
        """The arm that others are compared with first: stock BF16, or where it did not run, another stock arm."""
        ran = {row.arm for row in self.rows}
        return next((arm for arm in self.arms if arm in ran and is_stock(arm)), REFERENCE)

    @property
    def software(self) -> str:
        """The engine and its version."""
        if any(row.engine == TRANSFORMERS for row in self.rows):
            return f"Transformers {self.versions.get('transformers')}"
        return f"vLLM {self.versions.get('vllm', 'that did not start')}"

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


def times(values: Sequence[float]) -> Times | None:
    """The quantiles of times; None where there are none."""
    if not values:
        return None
    return Times(
        p50=quantile(values, 0.5), p99=quantile(values, 0.99), low=min(values), high=max(values), n=len(values)
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the values lies, between neighbours in proportion (numpy's default).

    >>> quantile([4.0, 1.0, 2.0], 0.5), quantile([1.0, 2.0], 0.99)
    (2.0, 1.99)
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ratios(rows: Iterable[Row]) -> list[Ratio]:
    """Of each row to stock BF16, and to each other stock arm, of the same case and session; else of the last session
    before, or of the first one after."""
    found = list(rows)
    return [ratio for row in found for other in _yardsticks(found, row) if (ratio := _ratio(row, other)) is not None]


def _yardsticks(rows: Sequence[Row], row: Row) -> Iterable[Row]:
    """The rows that one is compared with, the nearest of each stock arm."""
    nearest: dict[str, Row] = {}
    for other in rows:
        same = (other.workload, other.case) == (row.workload, row.case)
        early = other.session <= row.session or other.arm not in nearest
        if is_stock(other.arm) and same and other.arm != row.arm and early:
            nearest[other.arm] = other
    return nearest.values()


def is_stock(arm: str) -> bool:
    """Whether an arm is an engine without us, by its name."""
    return arm == REFERENCE or arm.startswith(STOCK)


def _ratio(row: Row, other: Row) -> Ratio | None:
    one, two = row.median, other.median
    if one is None or two is None:
        return None
    turns = [a / b for a, b in zip(row.ms, other.ms, strict=False) if a and b]
    return Ratio(
        workload=row.workload, case=row.case, arm=row.arm, of=other.arm, time=one / two, low=min(turns), high=max(turns)
    )  # fmt: skip


def is_bench(path: Path) -> bool:
    """Whether a file is a benchmark's, by its kind; one that cannot be read is not."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and document.get("kind") == KIND


def read(path: Path) -> Results:
    """A benchmark's results; InputError with one sentence that names the file, the place in it and the remedy."""
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a results file.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        said = " ".join(f"{place}: {first['msg']}".split())
        raise InputError(f"{path} is not whole ({said}): run `mixquant bench` again.") from None
