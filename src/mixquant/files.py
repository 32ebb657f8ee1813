"""Files: read or refused in one sentence, written whole or not at all, locked against a second run.

    text = read_text(path, "name a prompt file")    # InputError: "PATH cannot be read (...): name a prompt file."
    config = read_object(path, "download it again")    # InputError: "PATH is not a JSON object: download it again."
    with writing(path, "make room, or name another output"):
        write_json(path, document)

Every sentence ends in the remedy that the caller names, because only the caller knows what the file is for.

How a file is written: beside its name, flushed to the disk, renamed. A reader finds the old file or the new one, a kill
or a full disk leaves the old one. Trade-off: a flush waits for the disk, so these are for documents, not for streams.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mixquant.errors import InputError


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turns bytes that are no UTF-8, and everything that a file system answers, into one sentence."""
    try:
        yield
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}): {remedy}.") from None


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turns a full disk, and everything else that a file system answers, into one sentence."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): {remedy}.") from error


def read_text(path: Path, remedy: str) -> str:
    """A file's UTF-8 text, without the byte order mark that some editors begin with. InputError if unreadable."""
    with reading(path, remedy):
        return path.read_text(encoding="utf-8-sig")


def parse_json(text: str, where: str | Path, remedy: str) -> Any:
    """A JSON document. Raises InputError, with the place, for anything else."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON ({error}): {remedy}.") from None
    except RecursionError:  # thousands of brackets in one another
        raise InputError(f"{where} is nested too deeply: {remedy}.") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError where it cannot be read or holds something else."""
    document = parse_json(read_text(path, remedy), path, remedy)
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object: {remedy}.")
    return document


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """A JSON object, indented, in ASCII: what cannot be encoded (a path's stray bytes) is escaped."""
    write_text(path, json.dumps(document, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A UTF-8 text file, whole or not there."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """A file, whole or not there. A failure leaves what was there before, and no half beside it."""
    half = path.with_name(f"{path.name}.tmp")
    try:
        half.write_bytes(content)
        publish(half, path)
    except OSError:
        with suppress(OSError):
            half.unlink()
        raise


def publish(half: Path, path: Path) -> None:
    """Give a complete file its name: its bytes first, then the rename, so that no name ever points to half a file."""
    flush(half)
    half.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lock(path: Path, busy: str) -> FileLock:
    """The lock file at `path`, taken; InputError with the sentence `busy` where another process holds it.

    It goes with the process, however that ends. Call `unlock` to give it back earlier.
    """
    found = FileLock(path)
    try:
        found.acquire(blocking=False)
    except Timeout:
        raise InputError(busy) from None
    return found


def unlock(taken: FileLock) -> None:
    """Give a lock back. Its file goes first, while nobody else can hold it."""
    Path(taken.lock_file).unlink(missing_ok=True)
    taken.release()
