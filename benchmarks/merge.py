"""One results file from the journals of runs that shared out the tasks: the figures one run of all would have written.

    python benchmarks/merge.py OUT.json SECONDS COMMAND JOURNAL...

SECONDS: wall time of it all. COMMAND: what makes it again, for the report.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mixquant.evaluate.records import Record
from mixquant.evaluate.summary import summarize

OF_TASKS = ("suites", "examples")
"""What of a run's identity may differ between the parts."""


def main() -> None:
    output, seconds, command, *journals = sys.argv[1:]
    parts = [[json.loads(line) for line in Path(j).read_text(encoding="utf-8").split("\n")[:-1]] for j in journals]
    run, facts = merged([part[0]["run"] for part in parts]), {}
    for line in (line for part in parts for line in part if "facts" in line):
        facts |= line["facts"]
    run |= {"arms": {arm: facts[arm] for arm in run["arms"]}, "command": command, "notes": []}
    run |= {"time": {"seconds": {}, "total_seconds": float(seconds), "started": None}}
    document = json.dumps(summarize(records(parts), run), indent=1, ensure_ascii=False)
    Path(output).write_text(document + "\n", encoding="utf-8")


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The identity of one run of all tasks; the parts must have everything else in common."""
    common = [{key: value for key, value in run.items() if key not in OF_TASKS} for run in runs]
    if any(other != common[0] for other in common):
        sys.exit("The journals are of different runs: merge parts of one run.")
    examples = {task: digest for run in runs for task, digest in run["examples"].items()}
    return common[0] | {"suites": [suite for run in runs for suite in run["suites"]], "examples": examples}


def records(parts: Sequence[Sequence[dict[str, Any]]]) -> Iterator[Record]:
    return (Record(**line) for part in parts for line in part if "arm" in line)


if __name__ == "__main__":
    main()
