"""Clients that never stop asking a pair, while its servers are killed: what they see, and for how long.

Each of the clients asks again and again, every fourth of them for a stream. An answer is right with the expected
tokens, wrong with others; anything else is an error that a client may send again: a status, a broken connection, an
error in a stream, a stream without its finish_reason. A request that takes longer than `HANG_SECONDS` hangs.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from random import Random
from urllib.error import HTTPError

import psutil

from tests.pairs import START_SECONDS, Answer, Pair, wait_for

CLIENTS = 16
HANG_SECONDS = 30
PAUSE_SECONDS = 0.2
"""Of a client that got an error, before it asks again."""

ANSWERS = 100
"""That must be right."""

RETRIABLE_STATUS = (500, 503)
RETRIABLE = (
    *(f"status {status}" for status in RETRIABLE_STATUS), "connection refused", "connection broken",
    "an error in the stream", "a stream without finish_reason",
)  # fmt: skip
"""What a client may see beside right answers."""

VICTIMS = ("decode server 1", "router", "prefill server 1")


@dataclass
class Fault:
    """One process's end: what clients saw until all was well again, and how long that took."""

    victim: str
    at: float
    seen: Counter[str] = field(default_factory=Counter)
    recovery_s: float | None = None


@dataclass
class Soak:
    """What came of it. memory: of each process that served for ten seconds, resident MiB early and at the end."""

    seconds: float
    outcomes: Counter[str]
    faults: list[Fault]
    memory: dict[str, tuple[float, float]]

    def table(self) -> list[str]:
        """Markdown."""
        lines = ["| killed | what clients saw until an answer came | recovery, s |", "|---|---|---|"]
        for fault in self.faults:
            seen = ", ".join(f"{what} ({count})" for what, count in fault.seen.most_common())
            lines.append(f"| {fault.victim} | {seen or 'nothing'} | {fault.recovery_s or float('nan'):.1f} |")
        lines += ["", "| process | resident early, MiB | at the end |", "|---|---|---|"]
        lines += [f"| {name} | {early:.0f} | {late:.0f} |" for name, (early, late) in self.memory.items()]
        told = ", ".join(f"{count} {what}" for what, count in self.outcomes.most_common())
        return [f"{CLIENTS} clients, {self.seconds:.0f} s: {told}", "", *lines]


def soak(
    pair: Pair, prompts: Sequence[str], expected: Sequence[Answer], new_tokens: int, plan: Sequence[float]
) -> Soak:
    """Run until the last fault is over, `plan`'s last moment has come, and `ANSWERS` were right, however slow the
    machine. plan: when a process is killed, in seconds from the start, one after another of `VICTIMS`, and at last when
    to end."""
    clients = _Clients(pair, prompts, expected, new_tokens)
    begin = time.monotonic()
    memory = _Memory(pair)
    with ThreadPoolExecutor(CLIENTS) as pool:
        tasks = [pool.submit(clients.run, number) for number in range(CLIENTS)]
        try:
            for place, moment in enumerate(plan):
                deadline = begin + moment + START_SECONDS
                while time.monotonic() < begin + moment or not clients.well:
                    time.sleep(0.05)
                    clients.check()
                    assert time.monotonic() < deadline, f"nobody gets a right answer: {clients.outcomes}"
                    if clients.well:
                        memory.look()
                if place + 1 < len(plan):
                    clients.kill(VICTIMS[place % len(VICTIMS)])
            wait_for(lambda: clients.outcomes["right"] >= ANSWERS)
        finally:
            clients.stopped.set()
        for task in tasks:
            task.result()
    return Soak(time.monotonic() - begin, clients.outcomes, clients.faults, memory.grown())


class _Clients:
    def __init__(self, pair: Pair, prompts: Sequence[str], expected: Sequence[Answer], new_tokens: int) -> None:
        self.pair, self.prompts, self.expected, self.new_tokens = pair, prompts, expected, new_tokens
        self.outcomes: Counter[str] = Counter()
        self.faults: list[Fault] = []
        self.stopped, self.lock = threading.Event(), threading.Lock()

    @property
    def well(self) -> bool:
        """Whether the last fault is over."""
        return not self.faults or self.faults[-1].recovery_s is not None

    def check(self) -> None:
        """What no client may see ends it all: who waits for right answers behind a wrong one would wait for ever."""
        strange = set(self.outcomes) - {"right", *RETRIABLE}
        assert not strange, f"clients saw {strange} among {self.outcomes}"

    def kill(self, victim: str) -> None:
        self.pair.kill(victim)
        with self.lock:
            self.faults.append(Fault(victim, time.monotonic()))

    def run(self, number: int) -> None:
        """One client."""
        random = Random(number)
        while not self.stopped.is_set():
            place, sent = random.randrange(len(self.prompts)), time.monotonic()
            outcome = self._ask(place, stream=number % 4 == 0)
            with self.lock:
                self._count(outcome, sent)
            if outcome != "right":
                self.stopped.wait(PAUSE_SECONDS)

    def _count(self, outcome: str, sent: float) -> None:
        now = time.monotonic()
        self.outcomes[outcome if now - sent < HANG_SECONDS else f"hung: {outcome}"] += 1
        fault = self.faults[-1] if self.faults else None
        if fault is None or fault.recovery_s is not None:
            return
        if outcome != "right":
            fault.seen[outcome] += 1
        elif sent > fault.at:  # every answer needs every process
            fault.recovery_s = now - fault.at

    def _ask(self, place: int, stream: bool) -> str:
        try:
            tokens = self._stream(place) if stream else self._whole(place)
        except TimeoutError:
            return "no answer in time"
        except HTTPError as error:  # a stream's
            return f"status {error.code}"
        except (OSError, HTTPException) as error:
            return "connection refused" if "refused" in str(error) else "connection broken"
        if isinstance(tokens, str):
            return tokens
        return "right" if tokens == self.expected[place].tokens else "WRONG TOKENS"

    def _whole(self, place: int) -> list[int] | str:
        answer = self.pair.ask(self.prompts[place], self.new_tokens, timeout=2 * HANG_SECONDS)
        return answer.tokens if answer.status == 200 else f"status {answer.status}"

    def _stream(self, place: int) -> list[int] | str:
        tokens: list[int] = []
        with self.pair.stream(self.prompts[place], self.new_tokens, timeout=2 * HANG_SECONDS) as pieces:
            for piece in pieces:
                if "choices" not in piece:
                    return "an error in the stream"
                tokens += piece["choices"][0]["token_ids"]
                if piece["choices"][0]["finish_reason"]:
                    return tokens
        return "a stream without finish_reason"


class _Memory:
    """Resident memory of a pair's processes, with their children, while nothing is wrong."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.begin = time.monotonic()
        self.next = self.begin
        self.seen: dict[int, tuple[str, list[tuple[float, float]]]] = {}

    def look(self) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + 2
        parent = psutil.Process(self.pair.process.pid)
        for process in (parent, *parent.children()):
            try:
                own = [process] if process == parent else [process, *process.children(recursive=True)]
                mebibytes = sum(p.memory_info().rss for p in own) / 2**20
            except psutil.Error:
                continue
            name = "mixquant serve" if process == parent else _name(process)
            self.seen.setdefault(process.pid, (name, []))[1].append((now, mebibytes))

    def grown(self) -> dict[str, tuple[float, float]]:
        """Early: when a third of the time was over, so that caches have filled."""
        found = {}
        for pid, (name, samples) in self.seen.items():
            lived = samples[-1][0] - samples[0][0]
            if lived > 10:
                early = next(size for at, size in samples if at - samples[0][0] >= lived / 3)
                found[f"{name} ({pid}, {lived:.0f} s)"] = (early, samples[-1][1])
        return found


def _name(process: psutil.Process) -> str:
    try:
        command = process.cmdline()
    except psutil.Error:
        return "ended"
    return command[command.index("--role") + 1] if "--role" in command else "router"
