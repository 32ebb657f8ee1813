"""The figures of a run side by side: one line for each case, one cell for each arm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mixquant.bench.results import Ratio, Results, Row


@dataclass(frozen=True)
class Cell:
    """An arm's row in a case, and its time over the yardstick's; None for that itself, and where there is no time."""

    row: Row
    ratio: Ratio | None


@dataclass(frozen=True)
class Line:
    """A case: its workload and name, and the cells by arm. Of a yardstick that was repeated, the first."""

    workload: str
    case: str
    cells: dict[str, Cell]


def lines(results: Results) -> list[Line]:
    """All cases, in the order in which they were measured."""
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    ratios = {
        (ratio.workload, ratio.case, ratio.arm): ratio for ratio in results.ratios if ratio.of == results.yardstick
    }
    for row in results.rows:
        cells = found.setdefault((row.workload, row.case), {})
        cells.setdefault(row.arm, Cell(row, ratios.get((row.workload, row.case, row.arm))))
    return [Line(workload, case, cells) for (workload, case), cells in found.items()]


def printed(results: Results) -> Iterator[str]:
    """The lines as a Markdown table: medians in milliseconds, and the time over the yardstick's in brackets."""
    arms = [arm for arm in results.arms if any(arm == row.arm for row in results.rows)]
    yield f"| ms (time over {results.yardstick}'s) | {' | '.join(arms)} |"
    yield "|---" * (len(arms) + 1) + "|"
    for line in lines(results):
        yield f"| {line.workload}: {line.case} | {' | '.join(_words(line.cells.get(arm)) for arm in arms)} |"
    for arm, reason in results.missing.items():
        yield f"{arm} did not run: {reason}"


def _words(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    if cell.row.median is None:
        return "emulated"
    ratio = f" ({cell.ratio.time:.2f})" if cell.ratio and cell.ratio.time is not None else ""
    return f"{cell.row.median:,.2f}{ratio}"
