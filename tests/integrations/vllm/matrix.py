"""The table of docs/vllm-tests.md, from a run of the tests: python -m tests.integrations.vllm.matrix

It prints one row for each test that compares engines: what it compares, how many tokens are equal, the greatest
difference of log-probabilities, requests whose difference is one flipped FP4 code, and the differences of its controls.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HEADER = (
    "| test | what it compares | equal tokens | greatest difference | flips | controls |\n|---|---|---|---|---|---|"
)


@dataclass
class Matrix:
    """A pytest plugin that collects what the `check` fixture records."""

    described: dict[str, str] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.described[item.nodeid] = (getattr(item, "function", item).__doc__ or "").strip().partition("\n")[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = [(name, value) for name, value in report.user_properties if name in ("comparison", "contrasts")]
        if report.when == "call" and report.passed and found:
            name = Path(report.nodeid).name.removeprefix("test_").replace(".py::test_", ": ")
            comparisons = [value for name, value in found if name == "comparison"]
            contrasts = [value for name, value in found if name == "contrasts"]
            self.rows.append(row(name, self.described[report.nodeid], comparisons, contrasts))


def row(name: str, description: str, comparisons: list[dict[str, float]], contrasts: list[list[float]]) -> str:
    """One line of Markdown: sums and maxima over a test's comparisons, and for each control the least of its own."""
    cells = (
        f"`{name}`",
        description,
        f"{sum(each['equal'] for each in comparisons)}/{sum(each['tokens'] for each in comparisons)}",
        f"{max(each['difference'] for each in comparisons):.1e}",
        str(sum(each["flips"] for each in comparisons)),
        ", ".join(f"{min(control):.1e}" for control in zip(*contrasts, strict=True)),
    )
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    matrix = Matrix()
    status = pytest.main(["-q", str(Path(__file__).parent), *sys.argv[1:]], plugins=[matrix])
    print(HEADER, *matrix.rows, sep="\n")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
