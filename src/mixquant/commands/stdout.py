"""stdout until a command ends: what was printed is written, or it is said that it cannot be.

A reader that has read enough (`mixquant ... | head`) is no error: exit code 0. A full disk is one, in a sentence.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mixquant.errors import InputError


@contextmanager
def whole_output() -> Iterator[None]:
    """Run a command; raises InputError where its output cannot be written."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text
    stdout = None if sys.stdout is None else os.dup(1)  # Rich puts /dev/null in the place of one whose reader has left
    try:
        try:
            yield
        except SystemExit as done:
            if isinstance(done.__context__, BrokenPipeError) and _reader_has_left(stdout):
                sys.exit(0)  # where Rich and Typer say 1
            raise
        finally:
            _flush()
    finally:
        if stdout is not None:
            os.close(stdout)


def _reader_has_left(stdout: int | None) -> bool:
    """Whether it is stdout that is broken, and no pipe of a command's own."""
    if stdout is None:
        return False
    asked = select.poll()
    asked.register(stdout, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))


def _flush() -> None:
    """Write what stdout still holds. Where printing failed, this fails again: so it is said in one place."""
    try:
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries again at exit, and complains itself
        if isinstance(error, BrokenPipeError):
            return  # whatever else went wrong still counts
        raise InputError(f"The output cannot be written ({error.strerror}): send it to another place.") from None
