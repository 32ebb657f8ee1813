"""What a benchmark asks of an engine: seeded, so that every arm gets the same.

    prompts   time to the first token: prompts alone, several at once, and a short turn behind a long cached prefix
    decode    one step at several batch sizes, and while somebody else's prompt is read
    agent     conversations at once: system prompt and tools, then turns of a tool's result and an answer
    serve     load on servers that run already, by vLLM's own benchmark

A workload is a name, for the sizes below, or a JSON file of its fields, such as
`{"workload": "prompts", "alone": [8192], "together": [], "cached": [16384], "new": [512]}`. It is cut into cases, one
row for each arm; a case that a model's window cannot hold is left out, and said. Tokens are random: they cost what text
costs, and no two requests share a prefix by chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mixquant.errors import InputError
from mixquant.files import read_object
from mixquant.policy import choose_name

Tokens = list[int]
Some = Annotated[int, Field(ge=1, le=2**24)]
Range = tuple[Some, Some]

FIRST_TOKEN = 3
"""Ids below are often special."""


@dataclass(frozen=True)
class Case:
    """What one row measures. isl: prompt tokens, of which `cached` are in the prefix cache and `new` are not.

    batch: requests at once. window: the longest request, with its answer. tokens: the KV cache that all of them need.
    Of decode rows, `new` is the length of the prompt that somebody else sends meanwhile, 0 for none. rounds: how often
    each arm has its turn.
    """

    spec: Workload
    isl: int
    cached: int
    new: int
    batch: int
    window: int
    tokens: int
    rounds: int

    @property
    def name(self) -> str:
        if isinstance(self.spec, Agent):
            return f"{self.batch} conversations of {self.spec.turns} turns"
        if isinstance(self.spec, Serve):
            rate = f"{self.spec.rate:g} a second" if self.spec.rate else "at once"
            return f"{self.batch} requests of {self.isl:,} tokens and {self.spec.output:,} to write, {rate}"
        if isinstance(self.spec, Decode):
            return f"a step at batch {self.batch}" + (f" while {self.new:,} tokens are read" if self.new else "")
        many = f"{self.batch} x " if self.batch > 1 else ""
        return f"{many}{self.new:,} tokens" + (f" on {self.cached:,} cached" if self.cached else "")


class _Workload(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Prompts(_Workload):
    """alone, together: lengths of prompts by themselves, and of `requests` at once. new: on each of `cached`."""

    workload: Literal["prompts"] = "prompts"
    alone: list[Some] = [2048, 8192, 32768, 131072]
    together: list[Some] = [2048]
    requests: Some = 16
    cached: list[Some] = [16384]
    new: list[Some] = [128, 512, 1024]
    rounds: Some = 7

    def cases(self) -> Iterator[Case]:
        for n in self.alone:
            yield self._case(n, 0, 1)
        for n in self.together:
            yield self._case(n, 0, self.requests)
        for prefix in self.cached:
            for n in self.new:
                yield self._case(n, prefix, 1)

    def _case(self, new: int, cached: int, batch: int) -> Case:
        isl = cached + new
        return Case(self, isl, cached, new, batch, isl + 1, (isl + 1) * batch, self.rounds)


class Decode(_Workload):
    """batches: of requests behind prompts of `behind` tokens, over `steps` steps; then so many `neighbours` of them
    go on while a prompt of `reading` tokens is read (0: no such rows)."""

    workload: Literal["decode"] = "decode"
    batches: list[Some] = [1, 8, 32, 128]
    behind: Some = 256
    steps: Some = 64
    reading: Annotated[int, Field(ge=0, le=2**24)] = 8192
    neighbours: list[Some] = [32]
    rounds: Some = 5

    def cases(self) -> Iterator[Case]:
        for batch in self.batches:
            yield self._case(batch, 0)
        if self.reading:
            for batch in self.neighbours:
                yield self._case(batch, self.reading)

    def _case(self, batch: int, new: int) -> Case:
        window = self.behind + self.steps + 1
        return Case(
            self, self.behind, 0, new, batch, max(window, new + 1), window * batch + new + bool(new), self.rounds
        )


class Agent(_Workload):
    """conversations: at once, shared out over `agents`, each with a system prompt and tools of its own.

    system, tool, answer: from and to how many tokens; system prompts evenly, tool results and answers evenly on a
    logarithmic scale, since most are short. seed: the default's caches of an 8B model fit into an H200 three times.
    """

    workload: Literal["agent"] = "agent"
    conversations: Some = 16
    turns: Some = 8
    agents: Some = 4
    system: Range = (8192, 16384)
    tool: Range = (100, 4000)
    answer: Range = (60, 300)
    seed: int = 23
    rounds: Some = 2

    def cases(self) -> Iterator[Case]:
        talks = self.talks
        system = {talk.agent: talk.system for talk in talks}
        longest = max(talk.length for talk in talks)
        own = sum(talk.length - talk.system for talk in talks)
        yield Case(
            self, max(system.values()), 0, 0, self.conversations, longest, sum(system.values()) + own, self.rounds
        )

    @cached_property
    def talks(self) -> list[Talk]:
        """The conversations, without their words."""
        random = Random(self.seed)
        systems = [random.randint(*self.system) for _ in range(self.agents)]
        return [
            Talk(
                agent=place % self.agents,
                system=systems[place % self.agents],
                tools=[_between(random, self.tool) for _ in range(self.turns)],
                answers=[_between(random, self.answer) for _ in range(self.turns)],
            )
            for place in range(self.conversations)
        ]


class Serve(_Workload):
    """requests: of `input` tokens that write `output` each; rate: how many come in a second, 0 for all at once."""

    workload: Literal["serve"] = "serve"
    input: Some = 2048
    output: Some = 128
    requests: Some = 128
    rate: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    rounds: Some = 2

    def cases(self) -> Iterator[Case]:
        window = self.input + self.output
        yield Case(self, self.input, 0, self.input, self.requests, window, window * self.requests, self.rounds)


Workload = Prompts | Decode | Agent | Serve
_PARSED: TypeAdapter[Workload] = TypeAdapter(Annotated[Workload, Field(discriminator="workload")])
NAMED: dict[str, Workload] = {"prompts": Prompts(), "agent": Agent(), "decode": Decode(), "serve": Serve()}


@dataclass(frozen=True, kw_only=True)
class Talk:
    """One conversation's lengths: its system prompt, then a tool's result (first the user's words) and an answer."""

    agent: int
    system: int
    tools: Sequence[int]
    answers: Sequence[int]

    @property
    def length(self) -> int:
        return self.system + sum(self.tools) + sum(self.answers)

    def lengths(self, cached: int) -> Iterator[tuple[int, int, int]]:
        """Of each turn: prompt tokens that a cache can hold, all prompt tokens, and those of the answer. cached: of the
        system prompt, by a conversation before."""
        isl = self.system
        for tool, answer in zip(self.tools, self.answers, strict=True):
            isl += tool
            yield cached, isl, answer
            cached = isl + answer - 1  # the last token that is written has been read by nobody
            isl += answer


def _between(random: Random, ends: tuple[int, int]) -> int:
    low, high = ends
    return round(low * math.exp(random.random() * math.log(high / low)))


def read(names: Sequence[str]) -> list[Workload]:
    """Workloads by name, or from JSON files. InputError for what is neither."""
    if not names:
        raise InputError(f"No workload is named: choose from {', '.join(NAMED)}, or name a JSON file.")
    return [
        _file(Path(name)) if name.endswith(".json") else NAMED[choose_name("workload", name, NAMED)] for name in names
    ]


def _file(path: Path) -> Workload:
    document = read_object(path, "name a workload's file")
    try:
        found = _PARSED.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"][1:])) or "workload"
        said = " ".join(f"{place}: {first['msg']}".split())
        raise InputError(f"{path} is no workload ({said}): see docs/bench.md.") from None
    for name, value in document.items():
        if isinstance(value, list) and name in ("system", "tool", "answer") and value[0] > value[1]:
            raise InputError(f"{path}: {name} is from {value[0]} to {value[1]} tokens: write the smaller one first.")
    return found


def fitting(workloads: Sequence[Workload], window: int | None) -> tuple[list[Case], list[str]]:
    """The cases that a model's window holds, and a sentence for each that it does not. InputError where none fits."""
    cases = [case for workload in workloads for case in workload.cases()]
    kept = [case for case in cases if window is None or case.window <= window]
    if not kept:
        raise InputError(
            f"No workload fits into the model's window of {window:,} tokens (the shortest takes "
            f"{min(case.window for case in cases):,}): name a JSON file with shorter ones, as in docs/bench.md."
        )
    return kept, [
        f"Left out {case.spec.workload}, {case.name}: it takes {case.window:,} tokens of the model's {window:,}."
        for case in cases
        if case not in kept
    ]


def tokens(count: int, vocabulary: int, *seed: object) -> Tokens:
    """Random token ids; the same seed gives the same ones."""
    return Random(repr(seed)).choices(range(min(FIRST_TOKEN, vocabulary - 1), vocabulary), k=count)
