"""Results of `mixquant eval` as a page that people can read: HTML, Markdown (for GitHub) or one PNG of all charts.

    write([Path("results.json")], Path("report.html"))

`evaluate.reading` reads and checks files; `accuracy` and `divergence` say what is in them; `build` puts a `page`
together; `html`, `markdown` and `canvas` give it its form. The same files give the same report, to the byte.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from mixquant.errors import InputError

SUFFIXES = (".html", ".md", ".png")


def write(inputs: Sequence[Path], output: Path) -> None:
    """Write the report of results files; the suffix of `output` decides its form.

    Raises InputError for files that are no results, and for an output that cannot be written; what was there before
    is then still there.
    """
    if output.suffix not in SUFFIXES:
        raise InputError(f"A report is a .html, .md or .png file, not {output.name}: name such an output.")
    _replace(output, render(inputs, output))


def render(inputs: Sequence[Path], output: Path) -> bytes:
    """The bytes of the report that `output` would hold."""
    from mixquant.evaluate.reading import read
    from mixquant.report import build, canvas, html, markdown

    page = build.page({path: read(path) for path in inputs}, output.name)
    if output.suffix == ".png":
        return canvas.png(page)
    return (html.render(page) if output.suffix == ".html" else markdown.render(page)).encode("utf-8")


def _replace(output: Path, content: bytes) -> None:
    """Write under another name first: a reader never finds half a report."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(output)
    except OSError as error:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            partial.unlink()
        raise InputError(f"{output} cannot be written ({error.strerror}): name another output.") from None
