"""Plays one case on one engine and says how long everything took.

An engine takes requests and gives tokens, step by step; the clock is this process's own, so that times hold scheduler,
sampler and the way between processes, as a client's would. Nothing else runs meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mixquant.bench.workloads import Agent, Case, Decode, Talk, Tokens, tokens
from mixquant.errors import InputError

_BLOCK = 1024
"""Tokens at most in a block of the KV cache (hybrid models have large ones): the last one is not cached whole."""


@dataclass(frozen=True)
class Output:
    """What a step gave to one request. cached: how many of its prompt tokens came from the prefix cache."""

    request: str
    tokens: Tokens
    finished: bool
    cached: int


class Engine(Protocol):
    """A running engine, idle until it is given requests."""

    vocabulary: int

    def submit(self, ids: Tokens, answer: int) -> str:
        """Begin a request for exactly `answer` tokens, and return its name."""
        ...

    def step(self) -> list[Output]:
        """Wait for the next outputs of any request."""
        ...

    def forget(self) -> None:
        """Empty the prefix cache."""
        ...


@dataclass
class Request:
    """One request: when it was sent, when each of its tokens came, in seconds of the clock."""

    prompt: Tokens
    sent: float
    times: list[float] = field(default_factory=list)
    written: Tokens = field(default_factory=list)
    cached: int = 0
    finished: bool = False

    @property
    def first_ms(self) -> float:
        """Time to the first token."""
        return 1e3 * (self.times[0] - self.sent)


class Stage:
    """The requests on an engine, with their times."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self.engine, self.clock = engine, clock
        self._running: dict[str, Request] = {}

    def send(self, prompt: Tokens, answer: int) -> Request:
        request = Request(prompt, self.clock())
        self._running[self.engine.submit(prompt, answer)] = request
        return request

    def step(self) -> list[Request]:
        """Wait for tokens; the requests that are finished now."""
        outputs, now = self.engine.step(), self.clock()
        done = []
        for output in outputs:
            request = self._running[output.request]
            request.times += [now] * len(output.tokens)
            request.written += output.tokens
            request.cached = max(request.cached, output.cached)
            if output.finished:
                request.finished = True
                done.append(self._running.pop(output.request))
        return done

    def until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.step()

    def drain(self) -> Iterator[Request]:
        """Finished requests as they come, until none is left; more may be sent meanwhile."""
        while self._running:
            yield from self.step()


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One turn of one arm. ms: what arms are compared by: the time until all first tokens are there, of one decode
    step, or of all conversations. first_ms: of each request; later_ms: of each but a conversation's first.
    hit_rate: the share of prompt tokens that were cached. written: answer tokens. step_ms: between two tokens."""

    ms: float
    first_ms: Sequence[float] = ()
    later_ms: Sequence[float] = ()
    step_ms: float | None = None
    hit_rate: float | None = None
    written: int = 0


def play(
    case: Case, engine: Engine, seed: object, short: bool = False, clock: Callable[[], float] = time.perf_counter
) -> Sample:
    """One turn. seed: of what no turn before has sent. short: enough to warm up. clock: in seconds."""
    stage = Stage(engine, clock)
    if isinstance(case.spec, Agent):
        return _converse(case.spec, stage, seed, short)
    return _decode(case, case.spec, stage) if isinstance(case.spec, Decode) else _read(case, stage, seed)


def _read(case: Case, stage: Stage, seed: object) -> Sample:
    vocabulary = stage.engine.vocabulary
    prefix = tokens(case.cached, vocabulary, "prefix", case.cached)
    if prefix:  # whatever has thrown it out of the cache since
        stage.send(prefix, 1)
        list(stage.drain())
    prompts = [prefix + tokens(case.new, vocabulary, seed, case.isl, i) for i in range(case.batch)]
    requests = [stage.send(prompt, 1) for prompt in prompts]
    list(stage.drain())
    if case.cached - (found := min(request.cached for request in requests)) >= _BLOCK:
        raise InputError(f"Only {found:,} of {case.cached:,} tokens were cached: the KV cache is too small.")
    first = [request.first_ms for request in requests]
    ended = max(request.times[0] for request in requests)
    hits = sum(request.cached for request in requests) / (case.isl * case.batch)
    return Sample(ms=1e3 * (ended - requests[0].sent), first_ms=first, hit_rate=hits, written=case.batch)


def _decode(case: Case, spec: Decode, stage: Stage) -> Sample:
    """Between the last first token and the first end, every request gets a token in every step."""
    vocabulary = stage.engine.vocabulary
    prompts = [tokens(spec.behind, vocabulary, "behind", i) for i in range(case.batch)]
    requests = [stage.send(prompt, spec.steps + 1) for prompt in prompts]
    stage.until(lambda: all(request.times for request in requests))
    if case.new:
        begin = stage.clock()
        other = stage.send(tokens(case.new, vocabulary, begin), 1)
        stage.until(lambda: other.finished)
        first, end = [other.first_ms], other.times[0]
    else:
        first = []
        begin = max(request.times[0] for request in requests)
        stage.until(lambda: any(request.finished for request in requests))
        end = min(request.times[-1] for request in requests if request.finished)
    list(stage.drain())
    steps = max(sum(begin < moment <= end for moment in request.times) for request in requests)
    if not steps:
        raise InputError(f"No step ran with all {case.batch} requests: ask for more than {spec.steps} steps.")
    step = 1e3 * (end - begin) / steps
    return Sample(ms=step, first_ms=first, step_ms=step, written=sum(len(request.times) for request in requests))


def _converse(spec: Agent, stage: Stage, seed: object, short: bool) -> Sample:
    """All conversations at once; each turn goes out as soon as the answer before it is there."""
    stage.engine.forget()
    talks = spec.talks[:1] if short else spec.talks
    begin = stage.clock()
    living = {id(request): turns for request, turns in (_open(stage, talk, i, seed) for i, talk in enumerate(talks))}
    first: list[Request] = []
    later: list[Request] = []
    for request in stage.drain():
        turns = living.pop(id(request))
        (first if turns.done == 0 else later).append(request)
        if following := turns.next(stage, request):
            living[id(following)] = turns
    end = stage.clock()
    every = first + later
    hits = sum(r.cached for r in every) / sum(len(r.prompt) for r in every)
    paces = [1e3 * (r.times[-1] - r.times[0]) / (len(r.times) - 1) for r in every if len(r.times) > 1]
    return Sample(
        ms=1e3 * (end - begin),
        first_ms=[r.first_ms for r in every],
        later_ms=[r.first_ms for r in later],
        step_ms=statistics.median(paces) if paces else None,
        hit_rate=hits,
        written=sum(len(r.times) for r in every),
    )


@dataclass
class _Turns:
    """A conversation that goes on: its lengths, what its tool results are made of, and how many turns are done."""

    talk: Talk
    seed: object
    vocabulary: int
    done: int = 0

    def next(self, stage: Stage, request: Request) -> Request | None:
        """Send the next turn after a finished one, if there is one."""
        self.done += 1
        if self.done == len(self.talk.tools):
            return None
        history = request.prompt + request.written
        return stage.send(history + self.heard(), self.talk.answers[self.done])

    def heard(self) -> Tokens:
        """What the user says, or a tool returns, in this turn."""
        return tokens(self.talk.tools[self.done], self.vocabulary, self.seed, self.done)


def _open(stage: Stage, talk: Talk, place: int, seed: object) -> tuple[Request, _Turns]:
    vocabulary = stage.engine.vocabulary
    turns = _Turns(talk, (seed, place), vocabulary)
    system = tokens(talk.system, vocabulary, "system", talk.agent)
    return stage.send(system + turns.heard(), talk.answers[0]), turns
