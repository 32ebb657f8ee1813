"""Draws each kind of chart into a matplotlib figure.

Every chart is 400 x 262 units, so that its 11-unit words are readable on a phone, where it fills the width, and beside
another one on a screen. The words that name a line stand at its end instead of in a legend, and the name of the
vertical axis stands above it, where it reads without turning one's head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixquant.report.numerals import FORMATS, p_value, power_of_ten, signed_points
from mixquant.report.page import Chart, Curves, Differences, Flips, Point, is_nothing
from mixquant.report.palette import DASHES, LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 400, 262
TOP, BOTTOM = 30, 40
TITLE = 18
"""Height of a title, which only a PNG draws: in HTML it is part of the page."""
LINE_SPACING = 13.5
"""Least distance of two words at the ends of lines."""

Frame = str | tuple[str, str]
DATA, AXES = "data", "axes fraction"
"""What a point is measured in: the data's values, or shares of the axes' width and height."""


def draw(
    chart: Chart, figure: Figure, names: Mapping[str, str], corner: tuple[float, float], titled: bool = False
) -> None:
    """Draw a chart whose upper left corner is at `corner`, in units from the figure's own.

    names: each arm's colour and dash, by its name in the palette.
    """
    left, right = (46, 88) if isinstance(chart, Curves) else (134, 72)
    top = TOP + TITLE * titled
    width, height = figure.bbox.width, figure.bbox.height
    x, y = corner[0] + left, height - corner[1] - HEIGHT + BOTTOM
    axes = figure.add_axes((x / width, y / height, (WIDTH - left - right) / width, (HEIGHT - top - BOTTOM) / height))
    if titled:
        _write(axes, chart.title, (0, 1), (10 - left, 28), AXES, color=LIGHT["ink"], fontweight="bold")
    if isinstance(chart, Curves):
        _curves(chart, names, axes)
    elif isinstance(chart, Flips):
        _flips(chart, names, axes)
    else:
        _differences(chart, names, axes)


def _write(
    axes: Axes, words: str, at: tuple[float, float], offset: tuple[float, float], frame: Frame = DATA, **looks: Any
) -> None:
    """Words at an offset, in units of the chart, from a point of the axes."""
    looks = {"color": LIGHT["muted"]} | looks
    axes.annotate(words, at, offset, frame, "offset points", annotation_clip=False, **looks)


def _curves(chart: Curves, names: Mapping[str, str], axes: Axes) -> None:
    shown = {line.arm: [point for point in line.points if _is_shown(chart, point)] for line in chart.lines}
    every = [point for points in shown.values() for point in points]
    floor = min((point.y for point in every), default=0.0) / 2 if chart.y.unit == "kld" else None
    for line in reversed(chart.lines):
        _line(chart, names[line.arm], shown[line.arm], axes, floor)
    _horizontal(chart, axes)
    _vertical(chart, every, axes)
    _end_labels({arm: points[-1] for arm, points in shown.items() if points}, names, axes)


def _is_shown(chart: Curves, point: Point) -> bool:
    return not (chart.y.unit == "kld" and is_nothing(point.y))


def _line(chart: Curves, look: str, points: Sequence[Point], axes: Axes, floor: float | None) -> None:
    """look: the arm's name in the palette. floor: where a logarithmic axis ends, to which bands are drawn."""
    axes.plot(
        [point.x for point in points],
        [point.y for point in points],
        color=LIGHT[look],
        linestyle=DASHES[look],
        drawstyle="steps-post" if chart.steps else "default",
        marker="o" if len(points) <= 16 and not chart.steps else None,
        markersize=3.6,
    )
    bands = [(point.x, point.band) for point in points if point.band]
    x, high = [x for x, _ in bands], [high for _, (_, high) in bands]
    low = [low if floor is None else max(low, floor) for _, (low, _) in bands]
    axes.fill_between(x, low, high, color=LIGHT[look], alpha=0.1, linewidth=0)
    if len(points) == 1:  # too few for a band
        axes.vlines(x, low, high, color=LIGHT[look], linewidth=1)


def _horizontal(chart: Curves, axes: Axes) -> None:
    axes.set_xlabel(chart.x.label, labelpad=5)
    axes.grid(axis="x", visible=False)
    axes.margins(x=0.04)
    if chart.x.ticks:
        axes.set_xticks([place for place, _ in chart.x.ticks], [words for _, words in chart.x.ticks])
    else:
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.xaxis.set_major_formatter(lambda value, _: FORMATS[chart.x.unit](value))


def _vertical(chart: Curves, points: Sequence[Point], axes: Axes) -> None:
    _write(axes, chart.y.label, (0, 1), (-36, 11), AXES)
    values = [value for point in points for value in (point.y, *(point.band or ()))]
    if chart.y.unit == "kld":
        _logarithmic(values, [point.y for point in points], axes)
    elif chart.y.unit == "times":
        _factors(values, axes)
    else:
        _shares(values, axes)


def _logarithmic(values: Sequence[float], means: Sequence[float], axes: Axes) -> None:
    """From half the smallest mean to the greatest value."""
    from matplotlib.ticker import LogLocator

    if not means:
        return
    axes.set_yscale("log")
    axes.set_ylim(min(means) / 2, max(values) * 1.5)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(lambda value, _: power_of_ten(value))
    axes.minorticks_off()


def _shares(values: Sequence[float], axes: Axes) -> None:
    """From 0 where shares come near it, to 100 % where they come near that; never beyond either."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.08 * (high - low) or 0.01
    axes.set_ylim(0 if low < 0.25 * high else low - room, 1 + 0.02 * (1 - low) if high > 0.9 else high + room)
    axes.locator_params(axis="y", nbins=5)
    digits = 0 if high - low > 0.04 else 1
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.{digits}f} %")


def _factors(values: Sequence[float], axes: Axes) -> None:
    """From 0, so that a factor of one stands where it belongs."""
    axes.set_ylim(0, 1.08 * max(values, default=1.0))
    axes.axhline(1, color=LIGHT["muted"], linewidth=1)
    axes.locator_params(axis="y", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _end_labels(ends: Mapping[str, Point], names: Mapping[str, str], axes: Axes) -> None:
    """The arms' names right of the axes, each as near to its line's end as the others allow."""
    height = axes.bbox.height
    wanted = {arm: axes.transData.transform((point.x, point.y))[1] - axes.bbox.y0 for arm, point in ends.items()}
    for arm, place in _apart(wanted, height).items():
        _write(axes, arm, (1, place / height), (4, 0), AXES, va="center", color=LIGHT[names[arm]])


def _apart(wanted: Mapping[str, float], height: float) -> dict[str, float]:
    """Places in the order of the wanted ones, none higher than `height`, with room for words between them.

    Neighbours that are too near are pushed up; what then stands too high is pushed down again.
    """
    order = sorted(wanted, key=lambda arm: wanted[arm])
    places: list[float] = []
    for arm in order:
        places.append(max(wanted[arm], places[-1] + LINE_SPACING if places else 0.0))
    ceiling = height
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - LINE_SPACING
    return dict(zip(order, places, strict=True))


def _flips(chart: Flips, names: Mapping[str, str], axes: Axes) -> None:
    for place, row in enumerate(chart.rows):
        wrong, right = row.right_to_wrong / row.n, row.wrong_to_right / row.n
        axes.barh(place, -wrong, color=LIGHT[names[row.arm]], height=0.56)
        axes.barh(place, right, color=LIGHT[names[row.arm]], height=0.56, alpha=0.45)
        _write(axes, str(row.right_to_wrong), (-wrong, place), (-4, 0), ha="right", va="center_baseline")
        _write(axes, str(row.wrong_to_right), (right, place), (4, 0), va="center_baseline")
    colour = [LIGHT[names[row.arm]] for row in chart.rows]
    _rows(axes, [row.arm for row in chart.rows], [f"p {p_value(row.p)}" for row in chart.rows], colour)
    widest = 1.5 * chart.widest or 0.01  # room for the number beside the longest bar
    axes.set_xlim(-widest, widest)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * abs(value):g} %" if value else "0")
    axes.set_xlabel("share of examples", labelpad=5)
    _write(axes, "right to wrong", (0.5, 1), (-8, 8), AXES, ha="right")
    _write(axes, "wrong to right", (0.5, 1), (8, 8), AXES)


def _differences(chart: Differences, names: Mapping[str, str], axes: Axes) -> None:
    axes.axvspan(-chart.margin, chart.margin, color=LIGHT["grid"], linewidth=0)
    for place, row in enumerate(chart.rows):
        axes.plot(
            [row.low, row.high], [place, place], color=LIGHT[names[row.arm]], linewidth=2.4, solid_capstyle="butt"
        )
        fill = LIGHT["card"] if row.equal else LIGHT[names[row.arm]]
        axes.plot([row.mean], [place], "o", color=LIGHT[names[row.arm]], markerfacecolor=fill, markersize=6)
    pairs = [f"{row.arm} − {row.against}" for row in chart.rows]
    means = [signed_points(row.mean) for row in chart.rows]
    _rows(axes, pairs, means, [LIGHT[names[row.arm]] for row in chart.rows])
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+g}".replace("-", "−") if value else "0")
    axes.set_xlabel("accuracy, percentage points", labelpad=5)
    _write(axes, f"margin ± {100 * chart.margin:.2g}", (0, 1), (0, 8), ("data", "axes fraction"), ha="center")


def _rows(axes: Axes, names: Sequence[str], figures: Sequence[str], colours: Sequence[str]) -> None:
    """Around a line at zero, one row for each name, from above, with a figure on the right."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=LIGHT["muted"], linewidth=1)
    for place, (label, figure) in enumerate(zip(axes.get_yticklabels(), figures, strict=True)):
        label.set_color(colours[place])
        _write(axes, figure, (1, place), (8, 0), ("axes fraction", "data"), va="center_baseline", color=LIGHT["ink"])
