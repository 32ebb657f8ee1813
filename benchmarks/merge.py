"""One results file from the journals of runs that shared out the tasks: the figures one run of all would have written.

    python benchmarks/merge.py OUT.json SECONDS COMMAND JOURNAL...
    python benchmarks/merge.py OUT.json --short 1100 SECONDS COMMAND JOURNAL...
    python benchmarks/merge.py OUT.json --cut "what is missing" SECONDS COMMAND JOURNAL...

SECONDS: wall time of it all. COMMAND: what makes it again, for the report. --short: leave out rungs whose median prompt
is longer, as `mixquant eval --max-prompt-tokens` does. --cut: of a run that did not end, keep the examples that all
arms have answered, and say so in the notes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mixquant.evaluate.records import Record
from mixquant.evaluate.summary import summarize

OF_TASKS = ("suites", "examples")
"""What of a run's identity may differ between the parts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("command")
    parser.add_argument("journals", type=Path, nargs="+")
    parser.add_argument("--short", type=int)
    parser.add_argument("--cut")
    args = parser.parse_args()
    parts = [[json.loads(line) for line in j.read_text(encoding="utf-8").split("\n")[:-1]] for j in args.journals]
    run = merged([part[0]["run"] for part in parts])
    arms = {arm: {"policy": policy} for arm, policy in run["arms"].items()}
    for line in (line for part in parts for line in part if "facts" in line):
        for arm, facts in line["facts"].items():
            arms[arm] |= facts
    run |= {"arms": arms, "command": args.command, "notes": [args.cut] if args.cut else []}
    run |= {"time": {"seconds": {}, "total_seconds": args.seconds, "started": None}, "max_prompt_tokens": args.short}
    records = [Record(**line) for part in parts for line in part if "arm" in line]
    if args.cut:
        records = answered(records, set(run["arms"]))
    args.output.write_text(summarize(short(records, args.short), run).to_json(), encoding="utf-8")


def answered(records: Sequence[Record], arms: set[str]) -> list[Record]:
    """The records of examples that all arms have answered."""
    by: dict[tuple[str, int, int, int], set[str]] = defaultdict(set)
    for record in records:
        by[record.example].add(record.arm)
    return [record for record in records if by[record.example] == arms]


def short(records: Sequence[Record], longest: int | None) -> list[Record]:
    """The records of rungs whose median prompt is no longer than this."""
    lengths: dict[tuple[str, int], list[int]] = defaultdict(list)
    for record in records:
        lengths[record.task, record.rung].append(record.prompt_tokens)
    kept = {rung for rung, found in lengths.items() if longest is None or median(found) <= longest}
    return [record for record in records if (record.task, record.rung) in kept]


def merged(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The identity of one run of all tasks; the parts must have everything else in common."""
    common = [{key: value for key, value in run.items() if key not in OF_TASKS} for run in runs]
    if any(other != common[0] for other in common):
        sys.exit("The journals are of different runs: merge parts of one run.")
    examples = {task: digest for run in runs for task, digest in run["examples"].items()}
    return common[0] | {"suites": [suite for run in runs for suite in run["suites"]], "examples": examples}


if __name__ == "__main__":
    main()
