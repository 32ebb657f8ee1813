"""What arms say beside each other: uniform's divergence over theirs along the answer, their tails, their own chance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from mixquant.evaluate.results import Divergence, Results
from mixquant.policy import OF_CONTROLS
from mixquant.report import palette
from mixquant.report.lines import KLD, kld_of, lines
from mixquant.report.numerals import kld, percent
from mixquant.report.page import Axis, Curves, Line, Point, Row, Table

FEWEST_TAILS = 3
"""Tails that make a curve."""
POSITION = "position in the answer, by powers of two"
TAIL = "tail: precise tokens at the end of the prompt"


def charts(results: Results) -> Iterator[Curves]:
    yield from _along(results)
    yield from _by_tail(results)


def _along(results: Results) -> Iterator[Curves]:
    """How many times further from bf16 uniform is than each arm, along the answer."""
    drawn = [
        Line(
            arm=arm,
            points=[
                Point(x=row.start.bit_length(), y=row.ratio, band=(row.low, row.high))
                for row in found.ratios
                if row.ratio is not None and row.low is not None and row.high is not None
            ],
        )
        for arm, found in palette.items(results.along)
    ]
    drawn = [line for line in drawn if line.points]
    if drawn:
        x = Axis.octaves(POSITION, [row.start for found in results.along.values() for row in found.ratios])
        y = Axis(label="uniform's divergence over the arm's", unit="times")
        yield Curves(title="Uniform over the arm", x=x, y=y, lines=drawn)


def _by_tail(results: Results) -> Iterator[Curves]:
    """What a longer tail takes off the divergence: one line for arms that differ in nothing else."""
    alike: dict[object, dict[int, tuple[str, Divergence]]] = defaultdict(dict)
    for name, arm in palette.items(results.arms):
        if arm.policy and arm.divergence and arm.policy.prefill != "bf16":
            alike[arm.policy.prefill, arm.policy.decode, arm.policy.weights][arm.policy.tail] = name, arm.divergence
    curves = [dict(sorted(group.items())) for group in alike.values() if len(group) >= FEWEST_TAILS]
    drawn = [line for group in curves for line in _line(group)]
    if drawn:
        yield Curves(title="Divergence by tail", x=Axis.octaves(TAIL, set().union(*curves)), y=KLD, lines=drawn)


def _line(group: dict[int, tuple[str, Divergence]]) -> list[Line]:
    places = {id(found): tail.bit_length() for tail, (_, found) in group.items()}
    found = [found for _, found in group.values()]
    return lines({next(iter(group.values()))[0]: found}, lambda item: places[id(item)], kld_of)


def draws(results: Results) -> Iterator[Table]:
    """How much of an arm's divergence is chance: the arm against itself, equal up to rounding."""
    rows = [
        Row(
            head=name,
            cells=[kld(draw.kld_mean, draw.kld_se), kld(draw.shift, draw.shift_se), percent(draw.share, draw.share_se)],
            arm=name,
        )
        for name, arm in palette.items(results.arms)
        if (draw := arm.redraw)
    ]
    if rows:
        caption = (
            f"Another draw of an arm's own error: ARM{OF_CONTROLS} is the same arithmetic in another order of "
            "rounding. Two draws are twice as far apart as one is from their mean: half the distance is chance"
        )
        columns = ["Arm", "KLD between two draws, nats", "Shift of KLD to bf16, nats", "Chance of the draw"]
        yield Table(caption=caption, columns=columns, rows=rows, cards=True)
