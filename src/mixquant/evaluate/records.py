"""The journal of a run: one line of JSON for every answer, appended as it comes, so that a killed run resumes.

    {"run": {...}}                                         what was asked for; a run with other settings is refused
    {"facts": {"phase": {"kernels": {...}, ...}}}          what is known of an arm once it is open
    {"arm": "bf16", "task": "arithmetic", "rung": 3, ...}  one `Record` for each arm and example

A batch's records are written at once and flushed; a line that a kill has cut is dropped when the run resumes, and its
batch is run again. Two runs in one journal would answer everything twice, so it is locked; the lock goes with the
process, however that ends. A file that no run of ours began is never touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from mixquant.errors import InputError
from mixquant.evaluate.engine import TokenIds
from mixquant.files import lock, unlock, writing

Key = tuple[str, str, int, int, int]

REMEDY = "make room, or name another output"

_HEAD = b'{"run": '
"""How every journal begins."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One arm's answer to one example, and how far it is from the reference's.

    answer: the free run's token ids; text: their text. kld: KL(reference || arm) in nats at each position of the
    *reference's* answer, forced on this arm as decode; flips: the positions where the most likely token is another
    one. Both are None for the reference itself and where an engine cannot force tokens. redraw: of a quantized arm's
    control, KL(arm || control) at the same positions. nearly: whether it is right by the easier reading, if there is
    one.
    """

    arm: str
    task: str
    rung: int
    seed: int
    index: int
    label: str
    prompt_tokens: int
    right: bool
    answer: TokenIds
    text: str
    kld: list[float] | None = None
    flips: list[int] | None = None
    redraw: list[float] | None = None
    nearly: bool | None = None

    @property
    def key(self) -> Key:
        return self.arm, self.task, self.rung, self.seed, self.index

    @property
    def example(self) -> tuple[str, int, int, int]:
        """What the same example has in common in all arms."""
        return self.task, self.rung, self.seed, self.index


class Journal:
    """Appends records to a file, and gives back those that are already there."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """InputError for a file of another run, one in use, one that is damaged, and one that is no journal."""
        self.path = path
        self.records: dict[Key, Record] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        with ExitStack() as held:
            held.callback(unlock, lock_beside(path))
            self._file = held.enter_context(_open(path))
            self._resume(run)
            self._held = held.pop_all()

    def append(self, records: Iterable[Record]) -> None:
        """Write a batch's records; all or, after a kill, the first of them are there when the file is read again."""
        new = list(records)
        self._write(asdict(record) for record in new)
        self.records |= {record.key: record for record in new}

    def note(self, arm: str, facts: dict[str, Any]) -> None:
        """Write what is known of an arm, unless it is there already."""
        known = self.facts.get(arm, {})
        if known | facts != known:
            self._read({"facts": {arm: facts}})
            self._write([{"facts": {arm: facts}}])

    def close(self) -> None:
        with writing(self.path, REMEDY):
            self._held.close()

    def _resume(self, run: Mapping[str, Any]) -> None:
        """Read what is there; what follows the last line break is cut off, in the file too."""
        data = self._file.read()
        _check_head(self.path, data)
        whole = data[: data.rfind(b"\n") + 1]
        begun: dict[str, Any] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):  # an answer may hold other line separators
            with _undamaged(self.path, number):
                if number == 1:
                    begun = dict(json.loads(line)["run"])
                else:
                    self._read(json.loads(line))
        if whole:
            check_run(self.path, begun, json.loads(json.dumps(run)))
        self._file.truncate(len(whole))
        if not whole:
            self._write([{"run": run}])

    def _read(self, document: dict[str, Any]) -> None:
        if "facts" in document:
            for arm, facts in document["facts"].items():
                self.facts[arm] = self.facts.get(arm, {}) | facts
        else:
            record = _record(document)
            self.records[record.key] = record

    def _write(self, documents: Iterable[Any]) -> None:
        lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
        with writing(self.path, REMEDY):
            self._file.write(lines.encode("utf-8"))
            self._file.flush()


def check_run(path: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """InputError where a journal was begun by a run with other settings. run: as JSON gives it back."""
    for key in run.keys() | found.keys():
        if found.get(key) != run.get(key):
            raise InputError(
                f"{path} belongs to another run ({key} was {found.get(key)!r}, now {run.get(key)!r}): name another "
                "output, or delete it."
            )


def check(path: Path) -> None:
    """InputError where a file stands that is no journal: long before `Journal` would say so."""
    if path.exists():
        with writing(path, REMEDY), path.open("rb") as file:
            _check_head(path, file.read(len(_HEAD)))


def lock_beside(path: Path) -> FileLock:
    """Beside the journal: a lock file is emptied when it is taken."""
    with writing(path, REMEDY):
        return lock(
            path.with_name(f"{path.name}.lock"), f"Another run is writing {path}: wait for it, or name another output."
        )


def _open(path: Path) -> BinaryIO:
    """The file at its beginning; all writes go to its end."""
    with writing(path, REMEDY):
        file = path.open("a+b")
    file.seek(0)
    return file


def _check_head(path: Path, data: bytes) -> None:
    """A kill may have cut a journal anywhere."""
    if not (data.startswith(_HEAD) or _HEAD.startswith(data)):
        raise InputError(f"{path}, where the answers would go, is no journal of mixquant: name another output.")


@contextmanager
def _undamaged(path: Path, number: int) -> Iterator[None]:
    """Names the line that cannot be read."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError):
        remedy = "name another output" if number == 1 else "delete this line, and its example is run again"
        raise InputError(f"{path}, line {number} is damaged: {remedy}.") from None


_KINDS: dict[str, Any] = {
    **dict.fromkeys(["arm", "task", "label", "text"], str),
    **dict.fromkeys(["rung", "seed", "index", "prompt_tokens"], int),
    **{"right": bool, "answer": list},
    **dict.fromkeys(["kld", "flips", "redraw"], (list, type(None))),
    "nearly": (bool, type(None)),
}


def _record(document: dict[str, Any]) -> Record:
    for key, kind in _KINDS.items():
        if not isinstance(document[key], kind):
            raise TypeError(key)
    return Record(**document)
