"""The journal of a benchmark: one line of JSON for each row, as it comes, so that an interrupted run resumes.

    {"run": {...}}               what was asked for; a run with other settings is refused
    {"engine": "bf16", ...}      facts of an arm's engine
    {"row": {...}}               one arm in one case
    {"session": 0, "arms": ...}  engines that were to be resident together, by their arms
    {"later": "bf16", ...}       an arm that found no memory beside the others of a session, and has one of its own
    {"missing": "vllm:fp8", ...}  an arm that does not run here, and why; it is not tried again

A line that a kill has cut is dropped. Two runs in one journal are refused; the lock goes with the process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixquant.bench.results import Row
from mixquant.errors import InputError
from mixquant.evaluate.records import REMEDY, check_run, lock_beside
from mixquant.files import unlock, writing

Key = tuple[int, str, str, str]


class Journal:
    """An open journal. rows: what is measured, by (session, workload, case, arm); sessions: the arms of each; engines:
    facts, and missing: reasons, by arm; later: (session, arm)."""

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        """Begin a journal, or resume the one at `path`. InputError where it is another run's, damaged, or none."""
        self.path = path
        self.rows: dict[Key, Row] = {}
        self.sessions: list[list[str]] = []
        self.engines: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.later: set[tuple[int, str]] = set()
        self._lock = lock_beside(path)
        try:
            self._resume(json.loads(json.dumps(run)))
        except BaseException:
            unlock(self._lock)
            raise

    def add(self, row: Row) -> None:
        self._append({"row": row.model_dump(mode="json")})
        self.rows[key(row)] = row

    def begin(self, arms: list[str]) -> int:
        """A further session; its number."""
        self._append({"session": len(self.sessions), "arms": arms})
        self.sessions.append(arms)
        return len(self.sessions) - 1

    def note(self, arm: str, facts: dict[str, Any]) -> None:
        """Facts of an arm's engine, written where they are new."""
        if self.engines.get(arm) != facts:
            self._append({"engine": arm, "facts": facts})
            self.engines[arm] = facts

    def defer(self, session: int, arm: str) -> None:
        """An arm does not start in this session, and is to have another one."""
        self._append({"later": arm, "session": session})
        self.later.add((session, arm))

    def drop(self, arm: str, reason: str) -> None:
        """An arm does not run, or not any further."""
        self._append({"missing": arm, "reason": reason})
        self.missing[arm] = reason

    def close(self) -> None:
        unlock(self._lock)

    def _resume(self, run: Any) -> None:
        data = b""
        if self.path.exists():
            with writing(self.path, REMEDY):
                data = self.path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        begun: Any = {}
        for number, line in enumerate(lines, start=1):
            try:
                document = json.loads(line)
                if number == 1:
                    begun = dict(document["run"])
                elif "row" in document:
                    row = Row.model_validate_json(json.dumps(document["row"]))
                    self.rows[key(row)] = row
                elif "later" in document:
                    self.later.add((int(document["session"]), str(document["later"])))
                elif "session" in document:
                    self.sessions.append(list(document["arms"]))
                elif "missing" in document:
                    self.missing[document["missing"]] = str(document["reason"])
                else:
                    self.engines[document["engine"]] = dict(document["facts"])
            except (ValueError, TypeError, LookupError):
                raise InputError(f"{self.path}, line {number} is damaged: name another output, or delete it.") from None
        if lines:
            check_run(self.path, begun, run)
        if data and not lines and not b'{"run": '.startswith(data[:8]):
            raise InputError(f"{self.path} is no journal of mixquant: name another output.")
        with writing(self.path, REMEDY), self.path.open("ab") as file:
            file.truncate(sum(len(line) + 1 for line in lines))
        if not lines:
            self._append({"run": run})

    def _append(self, document: Mapping[str, Any]) -> None:
        with writing(self.path, REMEDY), self.path.open("ab") as file:
            file.write(json.dumps(document).encode() + b"\n")


def key(row: Row) -> Key:
    return row.session, row.workload, row.case, row.arm
