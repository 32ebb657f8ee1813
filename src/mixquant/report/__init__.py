"""Results of `mixquant eval` and `mixquant bench` as a page for people: HTML, Markdown (for GitHub) or one PNG of all
charts.

    write([Path("results.json")], Path("report.html"))

`evaluate.reading` and `bench.results` read and check files; `accuracy`, `divergence` and `speed` say what is in them;
`build` puts a `page` together; `html`, `markdown` and `canvas` give it its form. The same files give the same report,
to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixquant.errors import InputError
from mixquant.files import write_bytes, writing

if TYPE_CHECKING:
    from mixquant.bench import results as bench
    from mixquant.evaluate.results import Results

SUFFIXES = (".html", ".md", ".png")


def write(inputs: Sequence[Path], output: Path) -> None:
    """Write the report of results files; the suffix of `output` decides its form.

    Raises InputError for files that are no results, and for an output that cannot be written; what was there before
    is then still there.
    """
    if output.suffix not in SUFFIXES:
        raise InputError(f"A report is a .html, .md or .png file, not {output.name}: name such an output.")
    content = render(inputs, output)
    with writing(output, "name another output"):
        write_bytes(output, content)


def _read(path: Path) -> Results | bench.Results:
    from mixquant.bench import results as bench
    from mixquant.evaluate.reading import read

    return bench.read(path) if bench.is_bench(path) else read(path)


def render(inputs: Sequence[Path], output: Path) -> bytes:
    """The bytes of the report that `output` would hold."""
    from mixquant.report import build, canvas, html, markdown

    page = build.page({path: _read(path) for path in inputs}, output.name)
    if output.suffix == ".png":
        return canvas.png(page)
    return (html.render(page) if output.suffix == ".html" else markdown.render(page)).encode("utf-8")
