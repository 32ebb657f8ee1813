"""From a results file to the sections about divergence: its distribution, where it grows, and which layers cause it.

Nothing is said about figures that were not measured: a server, which cannot force answers, has a free run only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mixquant.report import palette
from mixquant.report.numerals import NONE, count, decibels, kld, percent, short_count, times, within
from mixquant.report.page import Axis, Block, Charts, Curves, Line, Point, Row, Section, Table

Json = Mapping[str, Any]
Bins = Mapping[str, Sequence[Json]]
"""By arm, figures of ranges of positions or prompt lengths, of rungs, or of layers."""

NORMAL_95 = 1.96
"""Standard errors on each side of a 95 % interval of a mean."""

KLD = Axis(label="KL divergence to bf16, nats a token", unit="kld")


def sections(results: Json) -> Iterator[Section]:
    """What was measured: forced answers, free answers, layers."""
    free = {arm: found["divergence"] for arm, found in palette.items(results["arms"]) if found["divergence"]}
    forced = {arm: found for arm, found in free.items() if found["positions"]}
    if forced:
        yield _distribution(forced)
    if free:
        yield _growth(forced, free)
    by_layer = {arm: found["by_layer"] for arm, found in forced.items() if found.get("by_layer")}
    if by_layer:
        yield _by_layer(by_layer)


def _distribution(arms: Json) -> Section:
    """Quantiles of the divergence, stretched towards the rare tokens where it hurts."""
    ticks = [(_rarity(q), words) for q, words in _QUANTILES]
    x = Axis(label="share of answer tokens that diverge less", unit="count", ticks=ticks)
    quantiles = [
        Line(arm=arm, points=[Point(x=_rarity(q), y=value) for q, value in found["quantiles"] if 0.5 <= q < 1])
        for arm, found in arms.items()
    ]
    chart = Curves(title="Divergence of single tokens", x=x, y=KLD, lines=quantiles, tabled=False)
    names = ["kld_median", "kld_p90", "kld_p99", "kld_p999", "kld_max"]
    rows = [
        Row(head=arm, cells=[*(quantile(found, name) for name in names), count(found["positions"])], arm=arm)
        for arm, found in arms.items()
    ]
    columns = ["Arm", "Median", "90 %", "99 %", "99.9 %", "Greatest", "Tokens"]
    caption = "Quantiles of the KL divergence, in nats, with 95 % intervals"
    table = Table(caption=caption, columns=columns, rows=rows, cards=True)
    lead = (
        "KL(bf16 || arm) at every token of bf16's answers, forced on each arm as decode. Most tokens are certain and "
        "hardly move; the rare ones on the right decide answers."
    )
    return Section(
        anchor="distribution", title="Distribution of the divergence", lead=lead, blocks=[Charts(charts=[chart]), table]
    )


def quantile(found: Json, name: str) -> str:
    """A quantile of the divergence with its interval, where one example is not all there is."""
    value, (low, high) = found[name], found["intervals"].get(name) or (None, None)
    return kld(value) if value is None or low is None or high is None else within("kld", value, low, high)


_QUANTILES = [(0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (0.9999, "99.99 %")]


def _rarity(q: float) -> float:
    """0.9 -> 1, 0.99 -> 2: how many nines a quantile has."""
    return -math.log10(1 - q)


def _growth(forced: Json, free: Json) -> Section:
    """Along the answer and with the prompt. forced: arms whose answers could be forced; free: all but bf16."""
    survival = [
        Line(arm=arm, points=[Point(x=position, y=share) for position, share in found["survival"]])
        for arm, found in free.items()
    ]
    token = Axis(label="answer token", unit="count")
    still = Axis(label="identical so far, free run", unit="percent")
    charts = [
        *(_growth_charts(forced) if forced else ()),
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


def _halves(forced: Json) -> Iterator[Table]:
    """The growth along the answer in one figure an arm."""
    grown = {arm: found["growth"] for arm, found in forced.items() if found["growth"]}
    if not grown:
        return
    rows = [
        Row(head=arm, cells=[times(found["ratio"], found["ratio_se"]), count(found["examples"])], arm=arm)
        for arm, found in grown.items()
    ]
    tokens = next(iter(grown.values()))["tokens"]
    caption = f"Divergence of tokens {tokens // 2 + 1} to {tokens} of an answer over that of its first {tokens // 2}"
    yield Table(caption=caption, columns=["Arm", "Second half over first", "Answers"], rows=rows)


def _free(arms: Json) -> Table:
    """How far free answers go along with bf16's."""
    rows = [
        Row(
            head=arm,
            cells=[
                percent(found["identical"], found["identical_se"]),
                _first(found),
                times(found["length_ratio"], found["length_ratio_se"]),
            ],
            arm=arm,
        )
        for arm, found in arms.items()
    ]
    columns = ["Arm", "Identical answers", "First divergent token, median", "Length over bf16's"]
    return Table(caption="Free run against bf16's", columns=columns, rows=rows, cards=True)


def _first(found: Json) -> str:
    """The median with its interval; an answer that stays identical never diverges."""
    value, (low, high) = found["first_divergence_median"], found["intervals"]["first_divergence_median"] or (None, None)
    if value is None:
        return "most never diverge"
    return f"{count(value)} [{NONE if low is None else count(low)}, {'never' if high is None else count(high)}]"


def _growth_charts(arms: Json) -> Iterator[Curves]:
    positions = {arm: found["by_position"] for arm, found in arms.items()}
    contexts = {arm: found["by_context"] for arm, found in arms.items()}
    position = _bins(positions, "position in the answer, by powers of two")
    context = _bins(contexts, "prompt tokens, by powers of two")
    flip = Axis(label="another most likely token", unit="percent")
    at, by = _places(positions), _places(contexts)
    flips = lines(positions, "flip_rate", lambda b: at[b["start"]])
    far = lines(positions, "kld", lambda b: at[b["start"]])
    yield Curves(title="Divergence by position", x=position, y=KLD, lines=far)
    yield Curves(title="Flipped tokens by position", x=position, y=flip, lines=flips)
    far = lines(contexts, "kld", lambda b: by[b["start"]])
    yield Curves(title="Divergence by prompt length", x=context, y=KLD, lines=far)


def _by_layer(arms: Bins) -> Section:
    names = list(dict.fromkeys(layer["layer"] for found in arms.values() for layer in found))
    place = {name: i for i, name in enumerate(names)}
    ticks = [(i, str(i)) for i in range(0, len(names), math.ceil(len(names) / 10))]
    x = Axis(label=f"layer, from {names[0]} to {names[-1]}", unit="count", ticks=ticks)
    far = lines(arms, "kld", lambda layer: place[layer["layer"]])
    chart = Curves(title="Divergence if one layer is quantized", x=x, y=KLD, lines=far, tabled=False)
    rows = [
        Row(
            head=f"{layer['layer']}, {arm}",
            cells=[kld(layer["kld_mean"], layer["kld_se"]), decibels(layer["sqnr_db"])],
            arm=arm,
        )
        for arm, found in arms.items()
        for layer in found
    ]
    table = Table(caption="Every layer", columns=["Layer and arm", "KLD, nats", "SQNR"], rows=rows, folded=True)
    lead = "Only this one layer is quantized, all others are bf16: where precision pays most."
    return Section(anchor="layers", title="By layer", lead=lead, blocks=[Charts(charts=[chart]), table])


def _places(bins: Bins) -> dict[int, float]:
    """Bins stand at equal distances: from where a bin starts to its place."""
    starts = sorted({b["start"] for found in bins.values() for b in found})
    return {start: float(place) for place, start in enumerate(starts)}


def _bins(bins: Bins, label: str) -> Axis:
    return Axis(
        label=label, unit="count", ticks=[(place, short_count(start)) for start, place in _places(bins).items()]
    )


def lines(bins: Bins, figure: str, place: Callable[[Json], float]) -> list[Line]:
    """One line, with 95 % intervals, for each arm for which a figure was measured anywhere; `kld` is its mean."""
    mean, se = ("kld_mean", "kld_se") if figure == "kld" else (figure, f"{figure}_se")
    measured = {arm: [b for b in found if b[mean] is not None] for arm, found in bins.items()}
    return [
        Line(arm=arm, points=[Point(x=place(b), y=b[mean], band=interval(b[mean], b[se])) for b in found])
        for arm, found in measured.items()
        if found
    ]


def interval(mean: float, se: float | None) -> tuple[float, float] | None:
    """The 95 % interval of a mean of something that is never negative; one example has none."""
    return None if se is None else (max(mean - NORMAL_95 * se, 0.0), mean + NORMAL_95 * se)
