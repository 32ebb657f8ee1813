"""An engine with a clock of its own: a step takes 10 ms and 1 ms more for each prompt token that is read in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mixquant.bench.play import Output, Sample, play
from mixquant.bench.workloads import Case, Tokens

STEP, TOKEN = 0.010, 0.001


@dataclass
class _Asked:
    ids: Tokens
    answer: int
    cached: int
    written: int = 0


@dataclass
class Scripted:
    """dies_at: the step in which it fails; slower: how many times as long everything takes. sent: every prompt."""

    slower: float = 1.0
    dies_at: int | None = None
    emulated: bool = False
    vocabulary: int = 64
    now: float = 0.0
    steps: int = 0
    tails: list[int | None] = field(default_factory=list)
    closed: bool = False
    sent: list[Tokens] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    _cache: list[Tokens] = field(default_factory=list)
    _running: dict[str, _Asked] = field(default_factory=dict)

    @property
    def facts(self) -> dict[str, Any]:
        return {"kernels": {"prefill": ["scripted"], "decode": ["scripted"]}, "emulated": self.emulated}

    def clock(self) -> float:
        return self.now

    def submit(self, ids: Tokens, answer: int) -> str:
        cached = max((_shared(ids, seen) for seen in self._cache), default=0)
        name = str(len(self.sent))
        self.sent.append(ids)
        self.answers.append(answer)
        self._running[name] = _Asked(ids, answer, min(cached, len(ids) - 1))
        return name

    def step(self) -> list[Output]:
        self.steps += 1
        if self.steps == self.dies_at:
            raise RuntimeError("the engine has died")
        read = sum(len(asked.ids) - asked.cached for asked in self._running.values() if not asked.written)
        self.now += self.slower * (STEP + TOKEN * read)
        outputs = []
        for name, asked in list(self._running.items()):
            asked.written += 1
            self._cache.append(asked.ids)
            done = asked.written == asked.answer
            outputs.append(Output(name, [asked.written], done, asked.cached))
            if done:
                self._cache.append(asked.ids + list(range(1, asked.written + 1)))
                del self._running[name]
        return outputs

    def turn(self, case: Case, seed: object, short: bool = False) -> Sample:
        return play(case, self, seed, short, self.clock)

    def forget(self) -> None:
        self._cache.clear()

    def switch(self, tail: int | None) -> None:
        self.tails.append(tail)

    def close(self) -> None:
        self.closed = True


def _shared(one: Tokens, other: Tokens) -> int:
    """Tokens that both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
