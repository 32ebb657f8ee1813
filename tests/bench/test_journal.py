"""The journal: it resumes, drops what a kill has cut, and refuses other runs, damage and a second writer."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixquant.bench.journal import Journal, key
from mixquant.errors import InputError

from .sample import row

RUN = {"rounds": 3, "arms": {"bf16": {"tail": None}}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "bench.jsonl", RUN)
    journal.add(row("bf16", [1.5]))
    journal.note("bf16", {"runner": "V2"})
    journal.note("bf16", {"runner": "V2"})
    journal.close()
    return journal.path


def resumed(path: Path) -> Journal:
    journal = Journal(path, RUN)
    journal.close()
    return journal


def test_it_resumes(path: Path) -> None:
    journal = resumed(path)
    assert journal.rows == {key(row("bf16", [1.5])): row("bf16", [1.5])}
    assert journal.engines == {"bf16": {"runner": "V2"}}
    assert path.read_text().count("\n") == 3


@pytest.mark.parametrize("left", [1, 9, 30])
def test_what_a_kill_has_cut_is_dropped(path: Path, left: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:left])
    assert len(resumed(path).rows) == 1
    assert path.read_bytes() == whole


def test_a_kill_in_the_first_line_begins_again(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:12])
    assert resumed(path).rows == {}
    assert path.read_text().count("\n") == 1


def test_an_arm_that_does_not_run_is_not_tried_again(path: Path) -> None:
    journal = Journal(path, RUN)
    journal.drop("vllm:fp8", "no kernel")
    journal.close()
    assert resumed(path).missing == {"vllm:fp8": "no kernel"}


def test_another_run_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"belongs to another run \(rounds was 3, now 4\)"):
        Journal(path, RUN | {"rounds": 4})
    resumed(path)  # the lock was given back


@pytest.mark.parametrize("line", [b"{}", b"no json", b'{"row": {"arm": "bf16"}}'])
def test_damage_is_named_by_its_line(path: Path, line: bytes) -> None:
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match="line 4 is damaged"):
        Journal(path, RUN)


def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("my notes")
    with pytest.raises(InputError, match="no journal"):
        Journal(path, RUN)
    assert path.read_text() == "my notes"


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path / "bench.jsonl", RUN)
    with pytest.raises(InputError, match="Another run is writing"):
        Journal(tmp_path / "bench.jsonl", RUN)
    first.close()


def test_an_arm_that_comes_later_is_known_when_the_run_resumes(path: Path) -> None:
    journal = Journal(path, RUN)
    journal.defer(0, "bf16")
    journal.close()
    assert resumed(path).later == {(0, "bf16")}
