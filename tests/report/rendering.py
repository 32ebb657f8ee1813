"""Reports of results files: as text, and the charts in them."""

from __future__ import annotations

from pathlib import Path

from mixquant.evaluate.reading import read
from mixquant.report import build, render
from mixquant.report.page import Curves


def text(folder: Path, *names: str, suffix: str = ".md") -> str:
    return render([folder / name for name in names], Path(f"report{suffix}")).decode()


def curves(folder: Path, title: str, name: str = "nvfp4.json") -> Curves:
    page = build.page({Path(name): read(folder / name)}, "report.md")
    return next(chart for row in page.rows for chart in row.charts if chart.title == title)
