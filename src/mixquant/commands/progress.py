"""What a long run shows while it goes on: what is being made, then a bar with an estimate; off a terminal, lines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def answering(arms: Sequence[str], work: Sequence[Batch]) -> Iterator[Callable[[str, int], None]]:
    """`with answering(arms, work) as advance: advance(arm, n)`, when an arm is done with n items."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    bar = Progress(
        TextColumn("{task.description}"), *columns, console=Console(stderr=True), disable=not sys.stderr.isatty()
    )
    total, done = len(arms) * sum(len(batch.items) for batch in work), 0
    task = bar.add_task("answers", total=total)

    def advance(arm: str, items: int) -> None:
        nonlocal done
        done += items
        stage(f"{done} of {total} answers")
        bar.update(task, advance=items, description=arm)

    with heartbeat("eval") as stage, bar:
        yield advance
