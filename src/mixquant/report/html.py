"""A page as one HTML file: its style, its charts and nothing from elsewhere; it needs no script.

Jinja2 escapes every word; only our own style and drawings go in as they are, in which matplotlib has escaped the words.
"""

from __future__ import annotations

import re
from importlib.resources import files

from mixquant.errors import InputError
from mixquant.report import canvas, palette
from mixquant.report.page import Page


def render(page: Page) -> str:
    try:
        import jinja2
    except ImportError:
        raise InputError("HTML needs Jinja2: pip install 'mixquant[plot]', or write a .md report.") from None
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["unbroken"] = _unbroken
    classes: dict[str, str] = {}
    colours = palette.names(page.arms)
    charts = [chart for row in page.rows for chart in row.charts]
    drawn = iter([canvas.svg(chart, f"chart-{i}", classes, colours) for i, chart in enumerate(charts)])
    return environment.from_string(_resource("page.html")).render(
        page=page,
        colours=colours,
        svg=lambda: next(drawn),
        charts=canvas.css(classes),
        light=palette.css(palette.LIGHT),
        dark=palette.css(palette.DARK),
        style=_resource("page.css"),
    )


def _unbroken(words: str) -> str:
    """Numbers stay on one line with their unit, their sign and their error."""
    return re.sub(r" (?=[%±×<])|(?<=[±×<]) ", "\N{NO-BREAK SPACE}", words)


def _resource(name: str) -> str:
    return files("mixquant.report").joinpath(name).read_text(encoding="utf-8")
