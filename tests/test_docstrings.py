"""The examples in the docstrings of the public names run, and give what they show."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

import mixquant

NAMES = ("Policy", "convert_", "memory", "prompt_length", "quantize")


def run(name: str, docstring: str | None) -> doctest.TestResults:
    """Run the examples of one docstring, which see nothing but what they import."""
    test = doctest.DocTestParser().get_doctest(docstring or "", {}, name, None, None)
    return doctest.DocTestRunner(verbose=False).run(test)


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = run(name, getattr(mixquant, name).__doc__)
    assert results.attempted > 0
    assert results.failed == 0


def test_control_an_example_that_shows_something_else_fails(capsys: pytest.CaptureFixture[str]) -> None:
    docstring = (mixquant.Policy.__doc__ or "").replace("'bf16'", "'fp16'")
    assert run("Policy", docstring).failed == 1
    assert "Expected:\n    'fp16'" in capsys.readouterr().out
