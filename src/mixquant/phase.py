"""The one rule: a token's phase is a property of the token and of its request, never of the batch.

    decode   if  the request had fewer than `min_prompt` prompt tokens to read when it was first scheduled
    prefill  if  position < prompt_len - tail
    decode   otherwise

So a prompt chunk of any length, even one row, is prefill; the last `tail` prompt tokens, generated tokens, drafts
under verification and generated tokens recomputed after preemption are decode. An engine knows three numbers of each
sequence in a batch (prompt length, tokens already computed, tokens scheduled now). `plan` turns them into runs of rows,
for the linear layers, which multiply each run by its weight; `count_rows` into sums, for what depends on how many rows
of each phase a step has: which CUDA graph may replay it, what the metrics say. Engines call these two, and none
reimplements the rule.

The first line is for prompts too short to gain by a second weight: all of such a request is tail. An engine that knows
it asks `reads_precisely` once for each request and keeps the answer for the request's life, whatever chunks it comes
in and however often it is preempted. With a `min_prompt` of 0 the line says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import accumulate, repeat

WHOLE_PROMPT = 1 << 30
"""A tail that no prompt is longer than."""


class Phase(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


def prefill_rows(prompt_len: int, computed: int, scheduled: int, tail: int) -> int:
    """How many of the `scheduled` tokens that follow `computed` ones are prefill: always the leading ones."""
    return min(max(prompt_len - tail - computed, 0), scheduled)


def reads_precisely(prompt_len: int, computed: int, min_prompt: int) -> bool:
    """Whether a request's whole prompt is tail; `computed` tokens of it are cached when it is first scheduled."""
    return prompt_len - computed < min_prompt


@dataclass(frozen=True, slots=True)
class Run:
    """Rows start..stop-1 of a flattened batch, all of one phase."""

    start: int
    stop: int
    phase: Phase


@dataclass(frozen=True)
class Plan:
    """The phases of a batch's rows, as maximal runs in row order."""

    runs: tuple[Run, ...]

    @property
    def rows(self) -> int:
        return self.runs[-1].stop if self.runs else 0

    @cached_property
    def only(self) -> Phase | None:
        """The phase of every row, if there is just one."""
        phases = {run.phase for run in self.runs} or {Phase.DECODE}
        return phases.pop() if len(phases) == 1 else None

    @cached_property
    def span(self) -> tuple[int, int]:
        """The smallest range of rows that holds every prefill row; (0, 0) if there is none."""
        prefill = [run for run in self.runs if run.phase is Phase.PREFILL]
        return (prefill[0].start, prefill[-1].stop) if prefill else (0, 0)

    @cached_property
    def decode_runs(self) -> list[Run]:
        return [run for run in self.runs if run.phase is Phase.DECODE]

    @cached_property
    def decode_rows(self) -> list[int]:
        """Indices of all decode rows."""
        return [row for run in self.decode_runs for row in range(run.start, run.stop)]


def plan(
    prompt_lens: Sequence[int], computed: Sequence[int], scheduled: Sequence[int], tail: int | Sequence[int]
) -> Plan:
    """Row runs of a batch whose sequences stand one after another, each with its `scheduled` rows.

    tail: of all sequences, or of each.
    """
    reading = _reading(prompt_lens, computed, scheduled, tail)
    spans = ((start, start + prefill_rows(*sequence)) for start, sequence in reading)
    return Plan(tuple(_runs(spans, sum(scheduled))))


def _reading(
    prompt_lens: Sequence[int], computed: Sequence[int], scheduled: Sequence[int], tail: int | Sequence[int]
) -> list[tuple[int, tuple[int, int, int, int]]]:
    """The sequences that are not beyond their prompts: the first row of each, and what `prefill_rows` asks.

    All rows of the others are decode, and in most steps every sequence is one of these: planning a thousand answers
    then takes the host a tenth of a millisecond.
    """
    tails = repeat(tail, len(prompt_lens)) if isinstance(tail, int) else tail
    sequences = zip(prompt_lens, computed, scheduled, tails, strict=True)
    starts = accumulate(scheduled, initial=0)  # and behind the last one the number of all rows
    return [
        (start, (prompt_len, done, count, each))
        for start, (prompt_len, done, count, each) in zip(starts, sequences, strict=False)
        if done < prompt_len
    ]


def _runs(prefill: Iterable[tuple[int, int]], rows: int) -> Iterator[Run]:
    """Maximal runs of so many rows, of which `prefill` spans from start to stop are prefill, in their order."""
    begin = end = 0  # of the prefill run that is open
    for start, stop in prefill:
        if start == stop:
            continue
        if start > end:
            if end > begin:
                yield Run(begin, end, Phase.PREFILL)
            yield Run(end, start, Phase.DECODE)
            begin = start
        end = stop
    if end > begin:
        yield Run(begin, end, Phase.PREFILL)
    if rows > end:
        yield Run(end, rows, Phase.DECODE)


class _DecodeOnly(Plan):
    """Its own class, because torch.compile guards an object's type and not its identity."""


DECODE_ONLY = _DecodeOnly(())
"""The plan of every step without prompt tokens, whatever its number of rows."""


@dataclass(frozen=True)
class RowCounts:
    """How many rows of a batch are prefill and how many decode; `tail` of the latter are prompt tokens."""

    prefill: int
    decode: int
    tail: int = 0

    @property
    def mixed(self) -> bool:
        """Whether there are rows of both phases."""
        return self.prefill > 0 and self.decode > 0


def count_rows(
    prompt_lens: Sequence[int], computed: Sequence[int], scheduled: Sequence[int], tail: int | Sequence[int]
) -> RowCounts:
    """The rows of a batch by phase, whatever the order of its sequences: the arguments are those of `plan`.

    An engine that picks a graph before it sorts its batch can count before it can plan.
    """
    reading = _reading(prompt_lens, computed, scheduled, tail)
    prefill = sum(prefill_rows(*sequence) for _, sequence in reading)
    prompt = sum(prefill_rows(*sequence[:3], tail=0) for _, sequence in reading)  # tails and all
    return RowCounts(prefill, decode=sum(scheduled) - prefill, tail=prompt - prefill)
