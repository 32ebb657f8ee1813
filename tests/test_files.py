"""Files: one sentence for each way a file can be unreadable, all or nothing when one is written, and locks."""

from __future__ import annotations

import json
import multiprocessing
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixquant.errors import InputError
from mixquant.files import lock, read_object, read_text, unlock, write_json, write_text, writing

CONTEXT = multiprocessing.get_context("fork")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\xff\xfe", "is not UTF-8 text: save it as UTF-8."),
        (b"{", "is not valid JSON .*: mend it."),
        (b"[1]", "is not a JSON object: mend it."),
        (b"[" * 100_000, "is nested too deeply: mend it."),
        (b"9" * 5000, "is not valid JSON .*: mend it."),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path} {sentence}"):
        read_object(path, "mend it")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere cannot be read \(No such file or directory\): name a prompt file\."):
        read_text(tmp_path / "nowhere", "name a prompt file")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\): name a prompt file\."):
        read_text(tmp_path, "name a prompt file")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    document = {"name": "Zoë \udcff", "count": 3}
    write_json(tmp_path / "a.json", document)
    assert read_object(tmp_path / "a.json", "mend it") == document
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with (
            pytest.raises(InputError, match=r"a.txt cannot be written \(File too large\): make room."),
            writing(path, "make room"),
        ):
            write_text(path, "after" * 100)

    assert exit_code(work) == 0
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_lock_is_held_by_one_process(tmp_path: Path) -> None:
    def take() -> None:
        unlock(lock(tmp_path / "a.lock", "Another run is at it: wait."))

    def refused() -> None:
        with pytest.raises(InputError, match="Another run is at it: wait"):
            take()

    assert exit_code(take) == 0
    held = lock(tmp_path / "a.lock", "")
    assert exit_code(refused) == 0
    unlock(held)
    assert exit_code(take) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    assert exit_code(lambda: json.dumps(str(lock(tmp_path / "a.lock", "")))) == 0
    assert (tmp_path / "a.lock").is_file()
    unlock(lock(tmp_path / "a.lock", "Another run is at it: wait."))


def exit_code(work: Callable[[], Any]) -> int | None:
    """Of a process that does `work`: 0 unless it raises."""
    process = CONTEXT.Process(target=work)
    process.start()
    process.join()
    return process.exitcode
