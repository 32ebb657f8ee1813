"""`mixquant plan`: how many prefill and decode servers a traffic needs, by the figures of `mixquant bench`.

    a prompt    t(cached, new) = a + b x new + c x new x (cached + new / 2), fitted to the bench's `prompts` rows of the
                arm `uniform`, which is what a prefill server runs: a fixed part, the products, attention
    a step      s(batch), between the bench's `decode` rows of the arm `bf16`, and the KV that longer contexts make it
                read, by the bandwidth that the bench measured
    servers     prefill: rate x t / 0.7. Decode: rate x osl x s(batch) / batch / 0.7, at the largest measured batch

A server that is busy for 70 % of the time makes prompts wait a little over their own time on average (a queue with one
server and fixed times, M/D/1). docs/plan.md goes through an example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixquant.bench import results
from mixquant.bench.results import Results, Row
from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import cache_bytes, load_config

MOST = 1e12
"""Of anything that is planned for: more is a slip, and its servers would be no number."""

BUSY = 0.7
"""Share of the time that a server is planned to work."""

ARMS = ("uniform", "bf16", "phase")
"""The bench's arms that stand for a prefill server, a decode server, and one engine that does both."""

REMEDY = "run `mixquant bench MODEL --arms bf16,uniform,phase --workload prompts,decode -o bench.json` on such a GPU"


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """isl, osl: tokens of a request's prompt, all of it, and of its answer. turns: of a conversation, each of which
    sends everything before it again. rate: requests (turns) a second. cache_hits: share of the prompts that prefill
    servers have in their caches; by default, what a conversation has sent before."""

    isl: int
    osl: int
    turns: int
    rate: float
    cache_hits: float | None = None

    @property
    def new(self) -> int:
        """Prompt tokens that a prefill server reads. Every turn brings as many, so that prompts are `isl` long on
        average; and each but the first brings the answer before it, which no prefill server has read."""
        if self.cache_hits is not None:
            return max(1, round(self.isl * (1 - self.cache_hits)))
        own = max(1.0, (self.isl - self.osl * (self.turns - 1) / 2) * 2 / (self.turns + 1))
        return min(self.isl, round(own + self.osl * (self.turns - 1) / self.turns))

    @property
    def cached(self) -> int:
        return self.isl - self.new


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Times in milliseconds. fit: the greatest error of a fitted prompt row, as a share."""

    device: str
    traffic: dict[str, Any]
    prefill: dict[str, Any]
    decode: dict[str, Any]
    hand_over: dict[str, Any]
    one_engine: dict[str, Any] | None
    fit: float
    notes: list[str]


def plan(model: str, files: Sequence[Path], traffic: Traffic, arms: Sequence[str] = ARMS) -> Plan:
    """The plan for a traffic. arms: the bench's, as in `ARMS`. InputError where the figures that it needs are not
    there."""
    _check(traffic)
    if len(arms) != len(ARMS):
        raise InputError(
            f"--arms names three of the bench's arms, such as {','.join(ARMS)}: for prefill servers, for decode "
            "servers and for engines that do both."
        )
    reader, writer, both = arms
    benches = _read(files)
    per_token = cache_bytes(load_config(find(model)))
    prompt, fit = prompt_time(benches, reader)
    step, batch, notes = step_time(benches, writer, traffic, per_token)
    prompt_ms = prompt(traffic.cached, traffic.new)
    readers = math.ceil(traffic.rate * prompt_ms / 1e3 / BUSY)
    busy = traffic.rate * prompt_ms / 1e3 / readers
    writers = math.ceil(traffic.rate * traffic.osl * step(batch) / 1e3 / batch / BUSY)
    at_once = _at_once(traffic.rate * traffic.osl / writers, step, batch)
    notes += [f"The figures are of {bench.model}, not of {model}." for bench in benches if bench.model != model]
    return Plan(
        device=benches[0].device,
        traffic={**asdict(traffic), "cached": traffic.cached, "new": traffic.new},
        prefill={
            "servers": readers, "prompt_ms": prompt_ms, "busy": busy, "wait_ms": busy / (2 * (1 - busy)) * prompt_ms,
        },
        decode={
            "servers": writers, "at_once": at_once, "step_ms": step(at_once),
            "cache_bytes": at_once * (traffic.isl + traffic.osl / 2) * per_token,
        },
        hand_over={
            "bytes_per_request": per_token * traffic.isl,
            "bytes_per_s": per_token * traffic.isl * traffic.rate,
        },
        one_engine=_one_engine(benches, both, traffic, per_token),
        fit=fit,
        notes=notes,
    )  # fmt: skip


def _check(traffic: Traffic) -> None:
    """Raise InputError for a traffic that cannot be."""
    brought = traffic.isl, traffic.osl, traffic.turns
    if min(brought) < 1 or not 0 < traffic.rate <= MOST or max(brought) > MOST:
        raise InputError(
            f"--isl, --osl, --turns and --rate are above 0, and no more than {MOST:.0e}: name what a request brings, "
            "and how many come."
        )
    if traffic.cache_hits is not None and not 0 <= traffic.cache_hits < 1:
        raise InputError(f"--cache-hits is a share from 0 to below 1, such as 0.8, not {traffic.cache_hits}.")
    if traffic.osl * (traffic.turns - 1) / 2 >= traffic.isl:
        raise InputError(
            f"Prompts of {traffic.isl} tokens cannot hold the answers of {traffic.turns} turns, {traffic.osl} tokens "
            "each: --isl is the whole prompt, on average over the turns."
        )


def _read(paths: Sequence[Path]) -> list[Results]:
    """The files; they must be of one device."""
    found = [results.read(path) for path in paths]
    devices = {bench.device for bench in found}
    if len(devices) > 1:
        raise InputError(f"The files are of several devices ({', '.join(sorted(devices))}): name those of one.")
    return found


def _rows(benches: Sequence[Results], workload: str, arm: str) -> list[Row]:
    return [row for bench in benches for row in bench.rows if (row.workload, row.arm) == (workload, arm)]


def _bandwidth(benches: Sequence[Results]) -> float | None:
    """Bytes a second, where a bench has measured them."""
    rates = ((engine.model_extra or {}).get("rates") for bench in benches for engine in bench.engines.values())
    return next((float(found["bandwidth"]) for found in rates if found), None)


def prompt_time(benches: Sequence[Results], arm: str) -> tuple[Callable[[float, float], float], float]:
    """(cached, new) -> milliseconds of a lone prompt, and the fit's greatest error as a share."""
    alone = [row for row in _rows(benches, "prompts", arm) if row.batch == 1]
    measured = {(row.cached, row.new): row.ttft_ms.p50 for row in alone if row.ttft_ms and row.ttft_ms.p50}
    if len(measured) < 2:
        raise InputError(f"The bench times fewer than two lengths of prompts of the arm {arm}: {REMEDY}.")
    terms, times = np.array([_terms(*length) for length in measured]), np.array(list(measured.values()))
    weights = _fit(terms / times[:, None])
    error = float(np.max(np.abs(terms @ weights / times - 1)))
    return lambda cached, new: float(_terms(cached, new) @ weights), error


def _terms(cached: float, new: float) -> Any:
    return np.array([1.0, new, new * (cached + new / 2)])


def _fit(terms: Any) -> Any:
    """The weights, none below 0, with which the terms of each row are nearest to 1."""
    best, smallest = np.zeros(terms.shape[1]), np.inf
    for count in range(1, terms.shape[1] + 1):
        for columns in itertools.combinations(range(terms.shape[1]), count):
            weights, *_ = np.linalg.lstsq(terms[:, columns], np.ones(len(terms)), rcond=None)
            error = float(np.sum((terms[:, columns] @ weights - 1) ** 2))
            if (weights >= 0).all() and error < smallest * (1 - 1e-9):
                best, smallest = np.zeros(terms.shape[1]), error
                best[list(columns)] = weights
    return best


def step_time(
    benches: Sequence[Results], arm: str, traffic: Traffic, per_token: int
) -> tuple[Callable[[float], float], int, list[str]]:
    """batch -> milliseconds of a decode step behind this traffic's contexts, the largest measured batch, and what that
    leaves out."""
    rows = {row.batch: row for row in _rows(benches, "decode", arm) if row.new == 0 and row.step_ms}
    if not rows:
        raise InputError(f"The bench times no decode step of the arm {arm}: {REMEDY}.")
    batches, bandwidth = sorted(rows), _bandwidth(benches)
    measured = [float(rows[batch].step_ms or 0) for batch in batches]
    longer = max(0.0, traffic.isl + traffic.osl / 2 - rows[batches[0]].isl)
    each = 1e3 * longer * per_token / bandwidth if bandwidth else 0.0
    notes = [] if bandwidth else ["Steps are of the bench's short contexts: it has measured no bandwidth."]
    return lambda batch: float(np.interp(batch, batches, measured)) + batch * each, batches[-1], notes


def _at_once(tokens_per_s: float, step: Callable[[float], float], most: int) -> float:
    """How many answers a server writes at once: as many as come while one is written (Little's law)."""
    low, high = 0.0, float(most)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if middle * 1e3 / step(middle) > tokens_per_s else (middle, high)
    return high


def _one_engine(benches: Sequence[Results], arm: str, traffic: Traffic, per_token: int) -> dict[str, Any] | None:
    """The same traffic on engines that read and write, where the bench has them: how many, and the gap between tokens,
    which waits for prompts too."""
    try:
        prompt, _ = prompt_time(benches, arm)
        step, batch, _ = step_time(benches, arm, traffic, per_token)
    except InputError:
        return None
    reading = traffic.rate * prompt(traffic.cached, traffic.new) / 1e3
    writing = traffic.rate * traffic.osl * step(batch) / 1e3 / batch
    engines = math.ceil((reading + writing) / BUSY)
    share = reading / engines
    at_once = _at_once(traffic.rate * traffic.osl / engines / (1 - share), step, batch)
    return {"engines": engines, "reading": share, "at_once": at_once, "gap_ms": step(at_once) / (1 - share)}


def tokens(text: str) -> int:
    """A number of tokens, k standing for 1,024. Raises InputError.

    >>> tokens("8k"), tokens("300")
    (8192, 300)
    """
    number, times = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    try:
        return round(float(number) * times)
    except (ValueError, OverflowError):
        raise InputError(f"{text} is no number of tokens: write 8192 or 8k.") from None


def show(found: Plan) -> None:
    """Print a plan."""
    asked, prefill, decode, moved = found.traffic, found.prefill, found.decode, found.hand_over
    print(
        f"{asked['rate']:g} requests a second, each of {asked['cached']:,} cached and {asked['new']:,} new prompt "
        f"tokens and\n{asked['osl']:,} of answer; {found.device}, servers busy for at most {BUSY:.0%} of the time\n\n"
        f"{prefill['servers']} prefill: a prompt takes {prefill['prompt_ms']:.0f} ms and waits for "
        f"{prefill['wait_ms']:.0f} ms on average; busy for {prefill['busy']:.0%}\n"
        f"{decode['servers']} decode: {decode['at_once']:.0f} answers at once, {decode['step_ms']:.1f} ms a token, "
        f"{decode['cache_bytes'] / 1e9:.1f} GB of KV\n"
        f"hand-over: {moved['bytes_per_request'] / 1e6:,.0f} MB of KV a request at most, "
        f"{moved['bytes_per_s'] / 1e9:,.1f} GB/s"
    )
    if one := found.one_engine:
        print(
            f"or {one['engines']} engines that read and write: {one['gap_ms']:.1f} ms a token on average, since they "
            f"read for {one['reading']:.0%} of the time"
        )
    for note in [f"A fitted prompt is off by {found.fit:.0%} at most.", *found.notes]:
        print(f"Note: {note}")
