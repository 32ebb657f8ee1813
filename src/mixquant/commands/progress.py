"""What a long run shows while it goes on: what is being made, then a bar with an estimate; off a terminal, lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from mixquant.commands.heartbeat import heartbeat
from mixquant.evaluate.runner import Batch


@contextmanager
def making() -> Iterator[Callable[[str], None]]:
    """`with making() as progress: progress("lookup, 2 steps")`; the last text is shown."""
    from rich.console import Console

    if not sys.stderr.isatty():
        with heartbeat("eval") as stage:
            yield lambda text: stage(f"making examples: {text}")
        return
    with Console(stderr=True).status("making examples") as status:
        yield lambda text: status.update(f"making examples: {text}")


class Progress:
    """Counts answers over all arms; `with Progress(arms, work) as progress: progress.advance(arm, n)`."""

    def __init__(self, arms: Sequence[str], work: Sequence[Batch]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty(),
        )  # fmt: skip
        self._total, self._done = len(arms) * sum(len(batch.items) for batch in work), 0
        self._task = self._bar.add_task("answers", total=self._total)
        self._lines = heartbeat("eval")
        self._stage: Callable[[str], None]

    def advance(self, arm: str, items: int) -> None:
        """Note that an arm is done with some items."""
        self._done += items
        self._stage(f"{self._done} of {self._total} answers")
        self._bar.update(self._task, advance=items, description=arm)

    def __enter__(self) -> Progress:
        self._stage = self._lines.__enter__()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._lines.__exit__(kind, error, trace)
