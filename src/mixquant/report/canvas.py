"""The charts of a page as pictures: each as SVG for HTML, or all of them on one PNG.

In the SVG words stay words in the page's own font, and the light colours become CSS variables, so that dark mode is a
matter of CSS. The output is deterministic: no dates, no random ids, none of the user's matplotlib settings.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

from mixquant.errors import InputError
from mixquant.report import charts, palette
from mixquant.report.charts import HEIGHT, WIDTH
from mixquant.report.page import Chart, Page
from mixquant.report.palette import LIGHT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.parse_math": False,
    "text.color": LIGHT["ink"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 1,
    "lines.linewidth": 1.8,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}

_NAMES = {colour: name for name, colour in LIGHT.items()}


def svg(chart: Chart, key: str, classes: dict[str, str], names: Mapping[str, str]) -> str:
    """One chart as an <svg> element without a size.

    key: unique on its page. classes: from a style to the name of its CSS class; new ones are added, and the page says
    them once for all charts (`css`). names: each arm's colour (`palette.names`).
    """
    with _style(key):
        figure = _figure(WIDTH, HEIGHT)
        charts.draw(chart, figure, names, (0, 0))
        out = io.StringIO()
        nothing = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    drawn = "".join(_element(child, classes) for child in ElementTree.fromstring(out.getvalue()))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">{drawn}</svg>'


def css(classes: Mapping[str, str]) -> str:
    """The styles of all charts, in our own colours."""
    rules = "\n".join(f".{name} {{ {style} }}" for style, name in classes.items())
    return _COLOUR.sub(lambda colour: f"var(--{_NAMES[colour[0]]})", rules)


def png(page: Page) -> bytes:
    """The verdicts of a page and below them all its charts, two in a row, at twice a screen's resolution."""
    rows = [pair for row in page.rows for pair in _pairs(row.charts)]
    names = palette.names(page.arms)
    said = [(part.name, part.sentence, part.about) for part in page.parts]
    head = "\n\n".join("\n".join(textwrap.fill(words, 88) for words in part) for part in said)
    top = 18 * (head.count("\n") + 1) + 40
    with _style("png"):
        figure = _figure(2 * WIDTH, top + HEIGHT * len(rows))
        figure.text(10 / figure.bbox.width, 1 - 16 / figure.bbox.height, head, va="top", fontsize=13, linespacing=1.3)
        for row, pair in enumerate(rows):
            for column, chart in enumerate(pair):
                charts.draw(chart, figure, names, (WIDTH * column, top + HEIGHT * row), titled=True)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=144, facecolor=LIGHT["paper"], metadata={"Software": None})
    return out.getvalue()


def _pairs(row: Sequence[Chart]) -> list[Sequence[Chart]]:
    return [row[i : i + 2] for i in range(0, len(row), 2)]


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """matplotlib's defaults and ours on top; `salt` makes the ids of one picture differ from another's."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("Charts need matplotlib: pip install 'mixquant[plot]', or write a .md report.") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": salt})
        yield


def _figure(width: float, height: float) -> Figure:
    """A figure whose unit is one pixel of an SVG."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), dpi=72)


def _element(node: ElementTree.Element, classes: dict[str, str]) -> str:
    """What matplotlib has drawn, to a tenth of a unit, and nothing else: groups that say nothing are left out."""
    tag = node.tag.rpartition("}")[2]
    if tag in ("metadata", "style"):
        return ""
    inner = escape(node.text or "") if tag == "text" else ""
    inner += "".join(_element(child, classes) for child in node)
    said = dict(_attributes(tag, node.attrib, classes))
    if (tag in ("g", "defs") and not inner) or (tag == "path" and node.get("style") == "fill: none"):
        return ""
    if tag == "g" and not said:
        return inner
    attributes = "".join(f" {name}={quoteattr(value)}" for name, value in said.items())
    return f"<{tag}{attributes}>{inner}</{tag}>" if inner else f"<{tag}{attributes}/>"


def _attributes(tag: str, found: Mapping[str, str], classes: dict[str, str]) -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        plain = name.rpartition("}")[2]
        if plain == "style":
            style = "; ".join(rule for rule in value.split("; ") if not rule.startswith("font-family"))
            yield "class", classes.setdefault(style, f"s{len(classes)}")
        elif plain in ("d", "x", "y", "width", "height"):
            yield plain, _NUMBER.sub(_short, " ".join(value.split()))
        elif not value.startswith("rotate(-0 ") and not (plain == "id" and tag == "g"):
            yield plain, value


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


_COLOUR, _NUMBER = re.compile("#[0-9a-f]{6}"), re.compile(r"-?[0-9]+\.[0-9]+")
