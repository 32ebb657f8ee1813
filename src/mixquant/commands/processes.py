"""Servers as processes of their own, each with a log file: started, awaited, watched and stopped together."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.error import HTTPError

from mixquant.errors import InputError

POLL_SECONDS = 0.25
STOP_SECONDS = 30.0
"""How long a server may take to end before it is killed."""

LAST_LINES = 12
LAST_BYTES = 1 << 14
"""Of a log that is read for its last lines."""


@dataclass
class Process:
    """One server: what it is called, its command, where it answers, and the file with all that it says.

    metrics: where Prometheus reads it, by default /metrics of `url`. restarts: how often it was started again.
    """

    name: str
    command: Sequence[str]
    url: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    metrics: str = ""
    restarts: int = field(default=-1, init=False)
    _running: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.metrics = self.metrics or f"{self.url}/metrics"

    @property
    def role(self) -> str:
        """prefill, decode or router: its name's first word."""
        return self.name.partition(" ")[0]

    def start(self) -> None:
        """Start it, or start it again; its log goes on. Its own session, so that Ctrl-C reaches it through us."""
        self.restarts += 1
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return None if self._running is None else self._running.poll()

    def is_healthy(self) -> bool:
        """Whether it answers at /health."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except HTTPError as error:
            return error.code == HTTPStatus.UNAUTHORIZED  # a router with a key asks for it here too
        except OSError:
            return False

    def last_words(self) -> str:
        """How it ended, and the last lines of its log."""
        code = self.code or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        with self.log.open("rb") as log:  # of a server that has run for weeks
            log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_BYTES))
            lines = log.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        return f"ended {how}; the last lines of {self.log}:\n" + "\n".join(f"    {line}" for line in lines)

    def ask_to_stop(self) -> None:
        if self._running is not None and self._running.poll() is None:
            self._running.terminate()

    def stop(self, deadline: float) -> None:
        """Wait for its end; what is left of it at the deadline is killed."""
        if self._running is None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._running.wait(max(0.0, deadline - time.monotonic()))
        with suppress(ProcessLookupError):
            os.killpg(self._running.pid, signal.SIGKILL)  # also what it has left behind
        self._running.wait()


def await_health(processes: Iterable[Process], say: Callable[[str], None]) -> None:
    """Wait until all answer. Raises InputError, with its last lines, for the first that ends instead."""
    waiting = list(processes)
    while waiting:
        for process in list(waiting):
            if process.code is not None:
                raise InputError(*f"{process.name} {process.last_words()}".split("\n", 1))
            if process.is_healthy():
                waiting.remove(process)
                say(f"{process.name} is ready at {process.url}.")
        time.sleep(POLL_SECONDS)


def stop_all(processes: Sequence[Process]) -> None:
    """Stop them: the last one first, the others together."""
    deadline = time.monotonic() + STOP_SECONDS
    for process in reversed(processes):
        process.ask_to_stop()
    for process in processes:
        process.stop(deadline)
