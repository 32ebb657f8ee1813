"""The journal and what else may lie in its place: other files, other runs, damage, and a run that is still going."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from mixquant.errors import InputError
from mixquant.evaluate.records import Journal, Record

RUN = {"seed": 0}


def record(index: int = 0, text: str = "ü") -> Record:
    return Record(
        arm="bf16", task="t", rung=0, seed=0, index=index, label="", prompt_tokens=3, right=True, answer=[1], text=text
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three records and an arm's facts."""
    journal = Journal(tmp_path / "journal.jsonl", RUN)
    journal.append(map(record, range(3)))
    journal.note("bf16", {"kernels": {}})
    journal.close()
    return journal.path


def refusal(path: Path, run: dict[str, Any] = RUN) -> str:
    """The sentence, after which the file is what it was."""
    before = path.read_bytes()
    with pytest.raises(InputError) as caught:
        Journal(path, run)
    assert path.read_bytes() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        '{"prompt": "6 x 7?", "answer": 42, "checker": "number"}\n',
        '{"prompt": "no line break"}',
        "notes\nof mine",
        "[1]\n",
        "\n",
        '{"runs": 3}\n',
    ],
)
def test_a_file_that_is_no_journal_is_never_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    said = refusal(path)
    assert said == f"{path}, where the answers would go, is no journal of mixquant: name another output."


@pytest.mark.parametrize("kept", [0, 3, 9])
def test_a_journal_that_a_kill_cut_in_its_first_line_begins_anew(path: Path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    Journal(path, RUN).close()
    assert json.loads(path.read_text()) == {"run": RUN}


def damaged(**changes: Any) -> str:
    return json.dumps({**vars(record(1)), **changes})


@pytest.mark.parametrize(
    "line",
    [
        '{"arm": "bf16", "ta',
        "",
        "3",
        "[]",
        '{"arm": "bf16"}',
        '{"facts": 3}',
        '{"facts": {"bf16": 3}}',
        damaged(answer=None),
        damaged(arm=["bf16"]),
        damaged(more=1),
        damaged(kld="low"),
        "\ufffd\udcff",
    ],
)
def test_a_damaged_line_is_named(path: Path, line: str) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[2] = line.encode("utf-8", "surrogateescape")
    path.write_bytes(b"\n".join(lines))
    said = refusal(path)
    assert said == f"{path}, line 3 is damaged: delete this line, and its example is run again."


@pytest.mark.parametrize("line", ['{"run": {"seed": 0', '{"run": 3}', '{"run": null}'])
def test_a_damaged_first_line_is_named(path: Path, line: str) -> None:
    path.write_text(line + "\n" + path.read_text().split("\n", 1)[1])
    assert refusal(path) == f"{path}, line 1 is damaged: name another output."


def test_another_run_is_named_and_left_alone(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"arm": "cut')
    assert "belongs to another run (seed was 0, now 1)" in refusal(path, {"seed": 1})


def hold(path: Path, held: Any, done: Any) -> None:
    journal = Journal(path, RUN)
    held.set()
    done.wait(60)
    journal.close()


def test_a_second_run_is_refused_and_a_later_one_goes_on(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(path, held, done))
    other.start()
    assert held.wait(60)
    assert refusal(path) == f"Another run is writing {path}: wait for it, or name another output."
    done.set()
    other.join()
    journal = Journal(path, RUN)
    assert [found.index for found in journal.records.values()] == [0, 1, 2]
    journal.close()


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(Is a directory\): make room, or name another output"):
        Journal(tmp_path, RUN)
