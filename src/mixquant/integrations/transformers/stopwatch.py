"""A streamer that times an answer, and tells a kernel's own time from time in which other jobs had the cores.

Why. Two OpenMP threads beside other jobs on two cores decode at a tenth of their speed, since each waits for the other
at every layer, and nothing in the wall clock's time says so. Linux counts for each thread how long it stood ready and
did not run (`schedstat`); where that is a good part of the time, the CPU time of the threads is the kernels' own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

TIMES = ("prefill_ms", "decode_ms_per_token", "waiting", "prefill_cpu_ms", "decode_cpu_ms_per_token")
"""What is measured: see `generation.Generation`."""

CONTENDED = 0.1
"""From this share of waiting on, a user is told that other jobs have the cores."""


@dataclass(frozen=True)
class Moment:
    """Seconds since some start: on the clock, of CPU time in this process, and of its threads' waiting for a core."""

    wall: float
    cpu: float
    waited: float

    @classmethod
    def now(cls) -> Moment:
        return cls(time.perf_counter(), time.process_time(), _waited())


def _waited() -> float:
    """Seconds in which this process's threads were ready and did not run; 0 where the system does not count them."""
    waited = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            waited += int(task.read_text(encoding="ascii").split()[1])
        except (OSError, IndexError):  # the thread has ended
            continue
    return waited / 1e9


class Stopwatch:
    """A streamer that notes when each token arrives and hands on the text as it grows, line by line decoded anew."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None], on_cpu: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.on_cpu = on_cpu
        self.token_ids: list[int] = []
        self._moments = [Moment.now()]  # of the start, and of each token
        self._line = 0  # first token of the line that is being written
        self._shown = ""  # what of that line is out
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # Transformers streams the prompt first
            self._prompt_seen = True
            return
        self.token_ids += value.flatten().tolist()
        self._moments.append(Moment.now())
        line = self._text(self._line)
        if not line.endswith("\ufffd"):  # else a character is not complete yet
            self._show(line)
        if line.endswith("\n"):
            self._line, self._shown = len(self.token_ids), ""

    def end(self) -> None:
        """Hand on what was held back."""
        self._show(self._text(self._line))

    def text(self) -> str:
        return self._text(0)

    def times(self) -> dict[str, float | None]:
        """What `TIMES` names: None for what was not measured."""
        start, first, last = self._moments[0], self._moments[1], self._moments[-1]
        tokens = len(self._moments) - 2  # after the first
        found: dict[str, float | None] = dict.fromkeys(TIMES)
        found["prefill_ms"] = round((first.wall - start.wall) * 1e3, 2)
        if tokens:
            found["decode_ms_per_token"] = round((last.wall - first.wall) * 1e3 / tokens, 3)
        if self.on_cpu:
            threads = torch.get_num_threads()
            found["waiting"] = round((last.waited - start.waited) / (last.wall - start.wall) / threads, 3)
            found["prefill_cpu_ms"] = round((first.cpu - start.cpu) * 1e3 / threads, 2)
            if tokens:
                found["decode_cpu_ms_per_token"] = round((last.cpu - first.cpu) * 1e3 / threads / tokens, 3)
        return found

    def _show(self, line: str) -> None:
        self.on_text(line[len(self._shown) :])
        self._shown = line

    def _text(self, first: int) -> str:
        return str(self.tokenizer.decode(self.token_ids[first:], skip_special_tokens=True))
