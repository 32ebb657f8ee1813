"""What `mixquant bench` has measured in a folder, and its workloads as files there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Measured(NamedTuple):
    folder: Path
    command: list[str]
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "bench.json").read_text()))

    def rows(self, workload: str) -> list[dict[str, Any]]:
        return [row for row in self.document["rows"] if row["workload"] == workload]


def write(folder: Path, workloads: Mapping[str, Mapping[str, Any]]) -> None:
    for name, fields in workloads.items():
        (folder / f"{name}.json").write_text(json.dumps({"workload": name, **fields}))
