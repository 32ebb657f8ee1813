"""Runs in processes of their own, which end at a moment that does not depend on the clock."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixquant.errors import InputError
from mixquant.offline.source import Unit

CONTEXT = multiprocessing.get_context("fork")  # starts at once: torch is loaded already
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def in_process(work: Callable[[], Any]) -> multiprocessing.Process:
    """Start `work` in a process of its own, which can be killed; its exit code is 2 for an InputError."""

    def run() -> None:
        torch.set_num_threads(1)
        try:
            work()
        except InputError as error:
            print(error)
            sys.stdout.flush()
            os._exit(2)
        os._exit(0)

    process = CONTEXT.Process(target=run)
    process.start()
    return process


def exit_code(work: Callable[[], Any]) -> int | None:
    """Of `work` in a process of its own."""
    process = in_process(work)
    process.join()
    return process.exitcode


def killed_before_write(number: int, folder: Path, work: Callable[[], Any]) -> bool:
    """Whether `work` was killed before the `number`-th thing that it does to files below `folder`, counted from 1."""

    def run() -> None:
        left = number

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if writes(event, arguments) and str(arguments[0]).startswith(str(folder)):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()

    found = exit_code(run)
    assert found in (0, -signal.SIGKILL)
    return found != 0


def writes(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is about to change a file or a folder."""
    if event == "open":
        flags = arguments[2]
        return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
    return event in WRITES


def stop_after(steps: Any) -> Any:
    """End the process when `steps` are done, as a kill would."""
    yield from steps
    os._exit(1)


def stop_after_two(units: Any) -> Any:
    return stop_after(units[:2])


def stop_after_first_shard(steps: Any) -> Any:
    """Pass what is measured before the units."""
    return stop_after(steps[:1]) if isinstance(steps[0], Unit) else steps
