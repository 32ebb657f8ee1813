"""Signs of life: what is being done, again and again, off a terminal only."""

from __future__ import annotations

import sys
import threading

import pytest

from mixquant.commands.heartbeat import heartbeat


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_the_latest_stage_is_said_until_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    said = threading.Event()
    with heartbeat("quantize", seconds=0.01) as stage:
        stage("layer 3 of 36")
        while not any("layer 3 of 36" in line for line in lines(capsys)):
            said.wait(0.01)
    lines(capsys)
    said.wait(0.1)
    assert lines(capsys) == []


def test_a_terminal_shows_a_bar_instead(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with heartbeat("quantize", seconds=0.01):
        threading.Event().wait(0.1)
    assert lines(capsys) == []
