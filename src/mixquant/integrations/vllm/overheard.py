"""Why an engine does not start, from what its processes say on stderr: vLLM itself answers "See root cause above".

    with overheard() as said:
        ...                       # engines start; what they say still reaches the user's stderr
    causes(said)                  # ["RuntimeError: no kernel for ..."]

stderr is a pipe meanwhile, which a thread copies line by line. Engines that do start go on writing into it, so the
thread lives as long as they do.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

STDERR = 2

_CAUSE = re.compile(r"pid=(\d+)\) ERROR .*?\] (?:\w+\.)*(\w*(?:Error|Exception|Interrupt): .+)")
"""How vLLM logs the last line of a traceback, in a worker or an engine's core."""


@contextmanager
def overheard() -> Iterator[list[str]]:
    """The lines that this process and its children write to stderr from here on; they are still written there."""
    lines: list[str] = []
    real = os.dup(STDERR)
    read, write = os.pipe()
    os.dup2(write, STDERR)
    os.close(write)
    threading.Thread(target=_copy, args=(read, real, lines), daemon=True).start()
    try:
        yield lines
    finally:
        os.dup2(real, STDERR)


def _copy(read: int, real: int, lines: list[str]) -> None:
    with os.fdopen(read, "rb") as pipe:
        for line in pipe:
            os.write(real, line)
            lines.append(line.decode(errors="replace").rstrip())


def causes(lines: Sequence[str]) -> list[str]:
    """The first error of each process, without those that only tell of another's."""
    found: dict[str, str] = {}
    for line in lines:
        if (match := _CAUSE.search(line)) and "root cause" not in line:
            found.setdefault(match[1], match[2].strip())
    return list(dict.fromkeys(found.values()))
