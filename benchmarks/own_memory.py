"""Memory that a process has of its own (anonymous memory), at its peak, and pages that it holds of mapped files."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Taken:
    """Bytes of anonymous memory beyond what there was before: at the peak, and in the end."""

    peak: int = 0
    after: int = 0


@contextmanager
def watched() -> Iterator[Taken]:
    """Look every millisecond at what the block takes; whole when it is over."""
    before, over, taken = anonymous_bytes(), threading.Event(), Taken()

    def watch() -> None:
        while not over.wait(0.001):
            taken.peak = max(taken.peak, anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield taken
    finally:
        over.set()
        watcher.join()
    taken.after = anonymous_bytes() - before


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def resident_bytes(file: Path) -> int:
    """Bytes of a mapped file that this process holds in memory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        fields = line.split()
        if "-" in fields[0]:
            counts = line.endswith(f" {file}")
        elif counts and fields[0] == "Rss:":
            total += int(fields[1]) * 1024
    return total


def in_fresh_process(script: str, *arguments: object) -> str:
    """What a script prints, called with arguments; glibc gives freed blocks of 1 MiB and more back at once."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
