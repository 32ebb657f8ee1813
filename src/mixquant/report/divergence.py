"""From results to the sections about divergence: its distribution, where it grows, and which layers cause it.

Nothing is said about figures that were not measured: a server, which cannot force answers, has a free run only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from mixquant.evaluate.results import Divergence, Growth, Interval, Layer, Position, Results
from mixquant.report import beside, palette
from mixquant.report.lines import KLD, Mean, kld_of, lines
from mixquant.report.numerals import NONE, count, decibels, kld, p_value, percent, times, within
from mixquant.report.page import Axis, Block, Charts, Curves, Line, Point, Row, Section, Table

Measured = Mapping[str, Divergence]
"""What was measured of each arm."""


def sections(results: Results) -> Iterator[Section]:
    """What was measured: forced answers, free answers, layers."""
    free = {arm: found.divergence for arm, found in palette.items(results.arms) if found.divergence}
    forced = {arm: found for arm, found in free.items() if found.positions}
    if forced:
        yield _distribution(results, forced)
    if free:
        yield _growth(results, forced, free)
    by_layer = {arm: found.by_layer for arm, found in forced.items() if found.by_layer}
    if by_layer:
        yield layers(by_layer)


def _distribution(results: Results, arms: Measured) -> Section:
    """Quantiles of the divergence, stretched towards the rare tokens where it hurts."""
    ticks = [(_rarity(q), words) for q, words in _QUANTILES]
    x = Axis(label="share of answer tokens that diverge less", unit="count", ticks=ticks)
    quantiles = [
        Line(arm=arm, points=points)
        for arm, found in arms.items()
        if (points := [Point(x=_rarity(q), y=value) for q, value in found.quantiles if 0.5 <= q < 1])
    ]
    chart = Curves(title="Divergence of single tokens", x=x, y=KLD, lines=quantiles, tabled=False)
    columns = ["Arm", "Median", "90 %", "99 %", "99.9 %", "Greatest", "Tokens"]
    caption = "Quantiles of the KL divergence, in nats, with 95 % intervals"
    rows = [Row(head=arm, cells=_quantile_cells(found), arm=arm) for arm, found in arms.items()]
    table = Table(caption=caption, columns=columns, rows=rows, cards=True)
    lead = (
        "KL(bf16 || arm) at every token of bf16's answers, forced on each arm as decode. Most tokens are certain and "
        "hardly move; the rare ones on the right decide answers."
    )
    blocks: list[Block] = [Charts(charts=[chart]), table, *beside.draws(results)]
    return Section(anchor="distribution", title="Distribution of the divergence", lead=lead, blocks=blocks)


def _quantile_cells(found: Divergence) -> list[str]:
    quantiles = [quantile(getattr(found, name), getattr(found.intervals, name)) for name in QUANTILES]
    return [*quantiles, kld(found.kld_max), count(found.positions)]


QUANTILES = ("kld_median", "kld_p90", "kld_p99", "kld_p999")


def quantile(value: float | None, interval: Interval | None) -> str:
    """A quantile of the divergence with its interval, where one example is not all there is."""
    return kld(value) if value is None or interval is None else within("kld", value, *interval)


_QUANTILES = [(0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %")]


def _rarity(q: float) -> float:
    """0.9 -> 1, 0.99 -> 2: how many nines a quantile has."""
    return -math.log10(1 - q)


def _growth(results: Results, forced: Measured, free: Measured) -> Section:
    """Along the answer and with the prompt. forced: arms whose answers could be forced; free: all but bf16."""
    survival = [
        Line(arm=arm, points=[Point(x=position, y=share) for position, share in found.survival])
        for arm, found in free.items()
        if found.survival
    ]
    token = Axis(label="answer token", unit="count")
    still = Axis(label="identical so far, free run", unit="percent")
    charts = [
        *(_growth_charts(forced) if forced else ()),
        *beside.charts(results),
        Curves(title="Answers not yet diverged", x=token, y=still, lines=survival, steps=True, tabled=False),
    ]
    lead = (
        "Does the error accumulate while the model writes, and does that of the prompt fade? Along the answer, all "
        "positions are means over the same answers, those that are long enough. The control tells how much of a rise "
        "is the text's own: later tokens may be harder to foresee. Longer prompts are other examples, and harder ones: "
        "compare arms there, not places. Bands are 95 % intervals; one that reaches down to the axis includes zero."
    )
    blocks: list[Block] = [Charts(charts=charts), *_halves(forced), _free(free)]
    return Section(anchor="growth", title="Where the error grows", lead=lead, blocks=blocks)


def _halves(forced: Measured) -> Iterator[Table]:
    """The growth along the answer in one figure an arm."""
    grown: dict[str, Growth] = {arm: found.growth for arm, found in forced.items() if found.growth}
    if not grown:
        return
    tested = any(found.p is not None for found in grown.values())
    rows = [Row(head=arm, cells=_half_cells(found, tested), arm=arm) for arm, found in grown.items()]
    tokens = next(iter(grown.values())).tokens
    caption = f"Divergence of tokens {tokens // 2 + 1} to {tokens} of an answer over that of its first {tokens // 2}"
    columns = ["Arm", "Second half over first", *(["Larger on", "p, sign test"] if tested else []), "Answers"]
    yield Table(caption=caption, columns=columns, rows=rows)


def _half_cells(found: Growth, tested: bool) -> list[str]:
    """tested: whether the run counted the answers whose second half diverges more."""
    counted = [percent(found.rises), p_value(found.p)] if tested else []
    return [times(found.ratio, found.ratio_se), *counted, count(found.examples)]


def _free(arms: Measured) -> Table:
    """How far free answers go along with bf16's."""
    rows = [Row(head=arm, cells=_free_cells(found), arm=arm) for arm, found in arms.items()]
    columns = ["Arm", "Identical answers", "First divergent token, median", "Length over bf16's"]
    return Table(caption="Free run against bf16's", columns=columns, rows=rows, cards=True)


def _free_cells(found: Divergence) -> list[str]:
    identical = percent(found.identical, found.identical_se)
    return [identical, _first(found), times(found.length_ratio, found.length_ratio_se)]


def _first(found: Divergence) -> str:
    """The median with its interval; an answer that stays identical never diverges."""
    value, (low, high) = found.first_divergence_median, found.intervals.first_divergence_median or (None, None)
    if value is None:
        return "most never diverge"
    return f"{count(value)} [{NONE if low is None else count(low)}, {'never' if high is None else count(high)}]"


def _growth_charts(arms: Measured) -> Iterator[Curves]:
    positions = {arm: found.by_position for arm, found in arms.items()}
    contexts = {arm: found.by_context for arm, found in arms.items()}
    position = Axis.octaves(beside.POSITION, [b.start for f in positions.values() for b in f])
    context = Axis.octaves("prompt tokens, by powers of two", [b.start for f in contexts.values() for b in f])
    flip = Axis(label="another most likely token", unit="percent")
    if far := lines(positions, lambda b: b.start.bit_length(), kld_of):
        yield Curves(title="Divergence by position", x=position, y=KLD, lines=far)
    if flips := lines(positions, lambda b: b.start.bit_length(), _flip_rate):
        yield Curves(title="Flipped tokens by position", x=position, y=flip, lines=flips)
    if far := lines(contexts, lambda b: b.start.bit_length(), kld_of):
        yield Curves(title="Divergence by prompt length", x=context, y=KLD, lines=far)


def layers(arms: Mapping[str, Sequence[Layer]]) -> Section:
    """What quantizing each layer alone does."""
    names = list(dict.fromkeys(layer.layer for found in arms.values() for layer in found))
    place = {name: i for i, name in enumerate(names)}
    ticks = [(i, str(i)) for i in range(0, len(names), math.ceil(len(names) / 10))]
    x = Axis(label=f"layer, from {names[0]} to {names[-1]}", unit="count", ticks=ticks)
    far = lines(arms, lambda layer: place[layer.layer], kld_of)
    chart = Curves(title="Divergence if one layer is quantized", x=x, y=KLD, lines=far, tabled=False)
    rows = [
        Row(head=f"{layer.layer}, {arm}", cells=[kld(layer.kld_mean, layer.kld_se), decibels(layer.sqnr_db)], arm=arm)
        for arm, found in arms.items()
        for layer in found
    ]
    table = Table(caption="Every layer", columns=["Layer and arm", "KLD, nats", "SQNR"], rows=rows, folded=True)
    lead = "Only this one layer is quantized, all others are bf16: where precision pays most."
    return Section(anchor="layers", title="By layer", lead=lead, blocks=[Charts(charts=[chart]), table])


def _flip_rate(found: Position) -> Mean:
    return found.flip_rate, found.flip_rate_se
