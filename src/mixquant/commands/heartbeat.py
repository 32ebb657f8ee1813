"""Signs of life of a long command where no terminal shows a progress bar: a line on stderr every 30 seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 30.0


@contextmanager
def heartbeat(command: str, seconds: float = SECONDS) -> Iterator[Callable[[str], None]]:
    """`with heartbeat("quantize") as stage: stage("layer 3 of 36")`; on a terminal nothing is printed."""
    latest = ["starting"]
    over = threading.Event()
    started = time.monotonic()

    def beat() -> None:
        while not over.wait(seconds):
            print(f"mixquant {command}: {latest[0]}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)

    def stage(text: str) -> None:
        latest[0] = text

    if sys.stderr.isatty():
        yield stage
        return
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield stage
    finally:
        over.set()
        thread.join()  # no line comes after the result
