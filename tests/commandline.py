"""The command line for tests: as a process of its own, or in this one, which has imported torch already."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from mixquant.cli import main

MIXQUANT = [sys.executable, "-m", "mixquant"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A process from start to end; one that imports Transformers takes seconds."""
    return subprocess.run([*MIXQUANT, *map(str, arguments)], capture_output=True, text=True, timeout=900)


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same in this process."""
    command = list(map(str, arguments))
    with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
        try:
            main(command)
        except SystemExit as end:
            return subprocess.CompletedProcess(command, int(end.code or 0), stdout.getvalue(), stderr.getvalue())
    raise AssertionError("main() ends by SystemExit")


def refuse(*arguments: str | Path) -> str:
    """The one sentence of a command that must fail cleanly, with nothing on stdout."""
    result = call(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("mixquant: ")
    return result.stderr
