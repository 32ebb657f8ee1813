"""How far one arm's answers are from the reference's: the figures of `arms.NAME.divergence` in the results.

Forced: KL divergence and changed top-1 tokens at the positions of the reference's answer, which ran as decode. Means
and their errors are over examples (the mean of each answer's mean); quantiles are over positions, as llama.cpp's are,
with intervals that count examples. Free: how long the arm's own answer stays the reference's. An engine that cannot
force tokens (a server) has the second half only.

Along the answer, every position is a mean over the *same* answers, those that are long enough: longer answers are
harder ones, and a mean over whatever reaches a position would show that as growth.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain, count, takewhile
from operator import gt, lt
from typing import Any, NamedTuple

from mixquant.evaluate.metrics import (
    Interval,
    Z,
    estimate,
    first_divergence,
    quantile,
    quantile_interval,
    ratio,
    survival,
)
from mixquant.evaluate.records import Record
from mixquant.evaluate.results import Along, Bin, Divergence, Growth, Intervals, Position, Ratio, Redraw
from mixquant.evaluate.significance import sign_test

Pairs = Sequence[tuple[Record, Record]]
"""An arm's record and the reference's, for each example."""

NAMED = {"kld_median": 0.5, "kld_p90": 0.9, "kld_p99": 0.99, "kld_p999": 0.999}
QUANTILES = [i / 20 for i in range(19)] + [1 - i / 10**k for k in (2, 3, 4) for i in range(9, 0, -1)] + [1.0]
"""Where the curve of quantiles is drawn: dense near 1, where arms differ."""


class Forced(NamedTuple):
    """One forced answer: KL divergence in nats at each position, and the positions where the top-1 token changes."""

    prompt_tokens: int
    kld: list[float]
    flips: list[int]


def distance(pairs: Pairs) -> Divergence:
    """All figures of one arm; those of forced answers are None or empty where none were forced."""
    answers = _forced_answers([record for record, _ in pairs])
    firsts = [first_divergence(record.answer, reference.answer) for record, reference in pairs]
    ordered = sorted(chain.from_iterable(answer.kld for answer in answers))
    places = _places(firsts)
    quantiles = {name: _interval([a.kld for a in answers], ordered, q) for name, q in NAMED.items()}
    first = _interval([[at] for at in places], sorted(places), 0.5)
    long, tokens = _long_enough(answers)
    return Divergence(
        **_forced(answers, ordered),
        **_free(pairs, firsts),
        intervals=Intervals(**quantiles, first_divergence_median=first),
        by_position=_by_position(long, tokens),
        growth=_growth(long, tokens) if tokens > 1 else None,
        by_context=_by_context(answers),
    )


def _forced_answers(records: Sequence[Record]) -> list[Forced]:
    return [Forced(r.prompt_tokens, r.kld, r.flips) for r in records if r.kld and r.flips is not None]


def mean_kld(kld: Sequence[float]) -> float:
    """Mean KL divergence over the positions of one answer, in nats."""
    return math.fsum(kld) / len(kld)


def _forced(answers: Sequence[Forced], ordered: Sequence[float]) -> dict[str, Any]:
    kld = estimate([mean_kld(answer.kld) for answer in answers])
    same = estimate([1 - len(answer.flips) / len(answer.kld) for answer in answers])
    return {
        "kld_mean": kld.mean,
        "kld_se": kld.se,
        **{name: quantile(ordered, q) if ordered else None for name, q in NAMED.items()},
        "kld_max": ordered[-1] if ordered else None,
        "same_top1": same.mean,
        "same_top1_se": same.se,
        "positions": len(ordered),
        "examples": len(answers),
        "quantiles": [(q, quantile(ordered, q)) for q in QUANTILES] if ordered else [],
    }


def _free(pairs: Pairs, firsts: Sequence[int | None]) -> dict[str, Any]:
    identical = estimate([first is None for first in firsts])
    lengths, expected = zip(*((len(record.answer), len(reference.answer)) for record, reference in pairs), strict=True)
    length = ratio(lengths, expected)
    return {
        "identical": identical.mean,
        "identical_se": identical.se,
        "first_divergence_median": quantile(sorted(_places(firsts)), 0.5),
        "length_ratio": length.mean,
        "length_ratio_se": length.se,
        "survival": survival(firsts, max(lengths + expected)),
    }


def _places(firsts: Sequence[int | None]) -> list[float]:
    """First divergences as numbers: an identical answer diverges at infinity."""
    return [math.inf if first is None else first for first in firsts]


def _interval(groups: Sequence[Sequence[float]], ordered: Sequence[float], q: float) -> Interval | None:
    return quantile_interval(groups, ordered, q) if ordered else None


def _long_enough(answers: Sequence[Forced]) -> tuple[Sequence[Forced], int]:
    """The answers that have so many tokens as a quarter of all answers have, down to a power of two; and how many."""
    if not answers:
        return [], 0
    quarter = sorted((len(answer.kld) for answer in answers), reverse=True)[len(answers) // 4]
    tokens = 1 << (quarter.bit_length() - 1)
    return [answer for answer in answers if len(answer.kld) >= tokens], tokens


def _growth(answers: Sequence[Forced], tokens: int) -> Growth:
    """Divergence in the second half of the first tokens over that in the first: 1 where nothing grows or fades."""
    first, second = zip(*(halves(answer, tokens) for answer in answers), strict=True)
    times = ratio(second, first)
    rises, falls = (sum(map(differs, second, first)) for differs in (gt, lt))
    return Growth(
        tokens=tokens, examples=len(answers), ratio=times.mean, ratio_se=times.se,
        rises=rises / (rises + falls) if rises + falls else None, p=sign_test(rises, falls),
    )  # fmt: skip


def halves(answer: Forced, tokens: int) -> tuple[float, float]:
    """Divergence in the first and the second half of the first tokens."""
    half = tokens // 2
    return math.fsum(answer.kld[:half]), math.fsum(answer.kld[half:tokens])


def along(arm: Sequence[Record], uniform: Sequence[Record]) -> Along | None:
    """How an arm's divergence stands to uniform's along the answer; None where answers are too short or not forced.

    Both are of the same text, so what the text makes of it cancels.
    """
    ours, tokens = _long_enough(_forced_answers(arm))
    theirs, _ = _long_enough(_forced_answers(uniform))
    if tokens < 2 or len(ours) != len(theirs):
        return None
    nears = fades = 0
    for a, b in zip(ours, theirs, strict=True):
        (first, second), (its_first, its_second) = halves(a, tokens), halves(b, tokens)
        nears += second * its_first < first * its_second
        fades += second * its_first > first * its_second
    return Along(
        tokens=tokens, examples=len(ours), nears=nears / (nears + fades) if nears + fades else None,
        p=sign_test(nears, fades), ratios=[_ratio(ours, theirs, *span) for span in _octaves(tokens)],
    )  # fmt: skip


def _ratio(ours: Sequence[Forced], theirs: Sequence[Forced], start: int, stop: int) -> Ratio:
    """On the logarithm, by the delta method: a ratio of divergences is skewed, and never negative."""
    times = ratio([math.fsum(a.kld[start:stop]) for a in theirs], [math.fsum(a.kld[start:stop]) for a in ours])
    reach = math.exp(Z * times.se / times.mean) if times.mean > 0 else math.nan
    return Ratio(start=start, stop=stop, ratio=times.mean, low=times.mean / reach, high=times.mean * reach)


def redraw(control: Sequence[Record], arm: Sequence[Record]) -> Redraw | None:
    """An arm against its control; None where there is none, or it was not measured."""
    drawn = [(c.redraw, c.kld, a.kld) for c, a in zip(control, arm, strict=False) if c.redraw and c.kld and a.kld]
    if not drawn:
        return None
    apart, theirs, ours = ([mean_kld(kld) for kld in column] for column in zip(*drawn, strict=True))
    far, share = estimate(apart), ratio([value / 2 for value in apart], ours)
    shift = estimate([b - a for a, b in zip(ours, theirs, strict=True)])
    return Redraw(
        kld_mean=far.mean, kld_se=far.se, share=share.mean, share_se=share.se, shift=shift.mean, shift_se=shift.se
    )


def _by_position(answers: Sequence[Forced], tokens: int) -> list[Position]:
    """Positions 0, 1, 2-3, 4-7, ... up to `tokens`, which all answers have."""
    rows = []
    for start, stop in _octaves(tokens):
        kld = estimate([mean_kld(answer.kld[start:stop]) for answer in answers])
        flips = estimate([sum(start <= at < stop for at in answer.flips) / (stop - start) for answer in answers])
        rows.append(
            Position(
                start=start, stop=stop, kld_mean=kld.mean, kld_se=kld.se,
                flip_rate=flips.mean, flip_rate_se=flips.se, examples=kld.n,
            )
        )  # fmt: skip
    return rows


def _by_context(answers: Sequence[Forced]) -> list[Bin]:
    """Prompt lengths between powers of two."""
    groups: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        groups[answer.prompt_tokens.bit_length()].append(mean_kld(answer.kld))
    rows = []
    for bits, values in sorted(groups.items()):
        start, stop = _octave(bits)
        kld = estimate(values)
        rows.append(Bin(start=start, stop=stop, kld_mean=kld.mean, kld_se=kld.se, examples=kld.n))
    return rows


def _octaves(tokens: int) -> Iterator[tuple[int, int]]:
    """The octaves of the first tokens."""
    return takewhile(lambda span: span[0] < tokens, map(_octave, count()))


def _octave(bits: int) -> tuple[int, int]:
    """The whole numbers of a bit length, from start up to but not including stop: 0, 1, 2-3, 4-7, ..."""
    return (1 << bits) >> 1, 1 << bits
