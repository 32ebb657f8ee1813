"""The answer in plain sentences: what does quantizing the prompt cost, what quantizing everything, is it real?

What counts as a cost is accuracy, pooled over all examples of the run. Divergence is the sharper instrument, but any
quantized arm diverges, and near the reference divergence says little about scores: it goes into the details, and tells
an arm inside the noise floor from one that costs nothing visible.

A *real* difference is one that `mixquant.evaluate.comparison` found. Not finding one proves nothing, so "no loss" is
said only where the whole 95 % interval of the difference lies above minus the margin (a test of non-inferiority at
2.5 % an arm, 5 % for the pair of arms), and otherwise "undecided", with the examples that it would take. The margin is
a share of BF16's right answers: where BF16 solves little, little is lost by losing all of it. Where it solves nearly
everything, the examples may be too easy to tell, which is said.

    an arm against bf16    loss | gain | undecided | within-noise-floor | no-loss
    phase against uniform  gain | loss | undecided | no-gain (better by less than the margin)

Where accuracy decides nothing, divergence may: what it shows is then said in the headline too, and why accuracy does
not decide is said once. "Within the noise" is not said of a run with too few examples to tell. Two quantized arms whose
divergences differ by less than another draw of their own errors shifts them are not told apart by it.

Whether prefill error fades and decode error accumulates is told by sign tests over answers (Holm's correction among
them): the second half of an answer against its first, in `phase`, whose error is the prompt's, and in `decode-only`,
whose error is the answer's; and phase's part of uniform's divergence, from which the text's own difficulty cancels.

`verdict` reads nothing but the document's comparisons and arms, so a report can be judged again from its file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from mixquant.evaluate.comparison import ALPHA, Comparison
from mixquant.evaluate.results import Along, Arm, Growth, Judged, Verdict
from mixquant.evaluate.significance import examples_needed, holm
from mixquant.policy import ARMS, CONTROL, OF_CONTROLS, REFERENCE

MARGIN = 0.01
"""Share of the reference's right answers whose loss is too small to matter."""

EASY = 0.99
"""Accuracy of the reference from which on the examples may be too easy to tell arms apart."""

FEW = 50
"""Examples below which a run cannot even say how many it would take, and nothing that it misses is called noise."""

SMALL = f"{100 * MARGIN:g} % of BF16's right answers"

SUBJECTS = {
    "phase": "Quantizing the prompt (phase)",
    "uniform": "Quantizing everything (uniform)",
    "decode-only": "Quantizing only the answer (decode-only)",
}

Arms = Mapping[str, Arm]
Rows = Mapping[tuple[str, str], Judged]
"""Comparisons by arm and what it was compared with."""


def judge(arm: str, against: str, row: Comparison, margin: float) -> Judged:
    """A comparison with its kind, and the examples that it would take if that is undecided."""
    kind, needed = _kind(row, against, margin), None
    if kind == "undecided" and margin and row.n >= FEW:
        changed = row.wrong_to_right, row.right_to_wrong
        wins, losses = changed if against == REFERENCE else reversed(changed)
        needed = examples_needed(wins, losses, row.n, margin)
    return Judged(arm=arm, against=against, margin=margin, **asdict(row), kind=kind, examples_needed=needed)


def _kind(row: Comparison, against: str, margin: float) -> str:
    if row.mcnemar_p_holm <= ALPHA:
        return "loss" if row.accuracy_difference < 0 else "gain"
    if against != REFERENCE:
        return "undecided" if row.high >= margin else "no-gain"
    if row.low <= -margin:
        return "undecided"
    within = row.kld_p_holm is not None and row.kld_p_holm > ALPHA
    return "within-noise-floor" if within else "no-loss"


def verdict(arms: Arms, comparisons: Sequence[Judged], along: Mapping[str, Along]) -> Verdict:
    """A headline, its parts, and details, all of them sentences; `outcome` in a word.

    along: arms beside uniform along the answer, where that was measured.
    outcome: phase-helps, uniform-is-enough, phase-does-not-help, undecided, or None where an arm is missing.
    """
    rows = {(row.arm, row.against): row for row in comparisons}
    costs = {arm: _cost(rows[arm, REFERENCE]) for arm in SUBJECTS if (arm, REFERENCE) in rows}
    outcome, against = None, None
    if pair := rows.get(("phase", "uniform")):
        outcome = _outcome(pair, rows["uniform", REFERENCE])
        against = _OUTCOMES[outcome](pair)
    return Verdict(
        sentence=_headline(arms, rows, costs, outcome, against),
        outcome=outcome,
        phase=costs.get("phase"),
        uniform=costs.get("uniform"),
        phase_against_uniform=against,
        details=[
            *(sentence for arm, sentence in costs.items() if arm == "decode-only"),
            *_growth(arms, along),
            *_redraws(arms),
            *_details(arms, rows),
        ],
    )


def _headline(arms: Arms, rows: Rows, costs: Mapping[str, str], outcome: str | None, against: str | None) -> str:
    """Each arm's cost and phase against uniform, or why accuracy tells none of it, and what divergence shows."""
    asked = [rows[pair] for pair in _HEADLINE if pair in rows]
    if not asked:
        return "No quantized arm was run: add phase and uniform to the arms."
    clear = _clear_divergence(arms, asked) if any(row.kind == "undecided" for row in asked) else []
    said: list[str | None]
    if not arms[REFERENCE].all.accuracy:
        said = [*clear, _unsolved(asked)]
    elif few := _too_few(asked):
        said = [few, *clear]
    else:
        said = [costs.get("phase"), costs.get("uniform"), against, _too_easy(arms, outcome), *clear]
    return " ".join(filter(None, said))


_HEADLINE = [("phase", REFERENCE), ("uniform", REFERENCE), ("phase", "uniform")]


def _unsolved(asked: Sequence[Judged]) -> str:
    n = asked[0].n
    return f"BF16 solves none of {n} example{'s' * (n != 1)}, so accuracy tells nothing: choose easier ones."


def _too_few(asked: Sequence[Judged]) -> str | None:
    """Why no accuracy is told from another, where examples are few."""
    n = asked[0].n
    if n >= FEW or any(row.kind != "undecided" for row in asked):
        return None
    most = [f"{row.arm} may cost up to {_points(-row.low)}" for row in asked if row.against == REFERENCE]
    few = "1 example is" if n == 1 else f"{n} examples are"
    return f"{few} too few to tell accuracies apart ({', '.join(most)}): take some hundred."


def _clear_divergence(arms: Arms, asked: Sequence[Judged]) -> list[str]:
    """What divergence shows beyond doubt: phase against uniform, or else how each arm stands to its noise floor."""
    clear = [row for row in asked if row.kld_p_holm is not None and row.kld_p_holm <= ALPHA]
    clear = [row for row in clear if not _within_draws(arms, row)]
    between = [row for row in clear if row.against != REFERENCE]
    return [f"By divergence, {_distance(row)}." for row in between or clear]


def _within_draws(arms: Arms, row: Judged) -> bool:
    """Whether another draw of the two arms' own errors shifts their divergence as much as they differ."""
    drawn = [arms[arm].redraw for arm in (row.arm, row.against)]
    shifts = [abs(draw.shift) for draw in drawn if draw and draw.shift is not None]
    return bool(shifts) and row.kld_difference is not None and abs(row.kld_difference) <= max(shifts)


def _outcome(phase: Judged, uniform: Judged) -> str:
    """phase: its comparison with uniform. uniform: its comparison with the reference."""
    if phase.kind == "gain":
        return "phase-helps"
    if phase.kind != "loss" and uniform.low > -uniform.margin:
        return "uniform-is-enough"
    return "undecided" if phase.kind == "undecided" else "phase-does-not-help"


def _cost(row: Judged) -> str:
    subject, at_most = SUBJECTS[row.arm], _points(max(0.0, -row.low))
    if row.kind == "loss":
        small = f", less than {SMALL}" if row.low > -row.margin else ""
        lost = _points(-row.accuracy_difference)
        return f"{subject} costs {lost} of accuracy ({_range(-row.high, -row.low)}){small}."
    if row.kind == "gain":
        return f"{subject} gains {_points(row.accuracy_difference)} of accuracy ({_range(row.low, row.high)})."
    if row.kind == "within-noise-floor":
        return (
            f"{subject} is within the noise floor: not measurably further from BF16 than BF16 in another batch "
            f"(at most {at_most} of accuracy with 95 % confidence)."
        )
    if row.kind == "no-loss":
        return f"{subject} costs nothing that this run can see (at most {at_most} of accuracy with 95 % confidence)."
    return f"{subject} is undecided: {_may(row, f'it may cost up to {at_most} of accuracy')}."


def _helps(row: Judged) -> str:
    small = f", but less than {SMALL}" if row.high < row.margin else ""
    return (
        f"Phase is better than uniform by {_points(row.accuracy_difference)} "
        f"({_range(row.low, row.high)}, {_p(row.mcnemar_p_holm)}): the difference is real{small}."
    )


def _enough(row: Judged) -> str:
    return (
        f"Uniform is enough here: it loses less than {SMALL}, and phase is not shown to be better (by at most "
        f"{_points(max(0.0, row.high))})."
    )


def _no_help(row: Judged) -> str:
    if row.kind == "loss":
        return f"Phase does not help here: it is worse than uniform by {_points(-row.accuracy_difference)}."
    return f"Phase does not help here: it is better than uniform by at most {_points(max(0.0, row.high))}."


def _open(row: Judged) -> str:
    may = _may(row, f"it may be by up to {_points(row.high)}")
    return f"Whether phase is better than uniform is undecided: {may}."


_OUTCOMES = {"phase-helps": _helps, "uniform-is-enough": _enough, "phase-does-not-help": _no_help, "undecided": _open}


def _too_easy(arms: Arms, outcome: str | None) -> str | None:
    accuracy = arms[REFERENCE].all.accuracy
    if accuracy < EASY or outcome not in ("uniform-is-enough", "phase-does-not-help"):
        return None
    return f"But BF16 solves {100 * accuracy:.4g} % of these examples: harder ones may tell the arms apart."


def _growth(arms: Arms, along: Mapping[str, Along]) -> Iterator[str]:
    """Does the prompt's error fade along the answer, and does the answer's accumulate?"""
    grown = {arm: found for arm in ("phase", "decode-only") if (found := _grown(arms, arm))}
    beside = along.get("phase")
    tested: list[Growth | Along] = [*grown.values(), *([beside] if beside else [])]
    corrected = dict(zip(map(id, tested), holm([1.0 if test.p is None else test.p for test in tested]), strict=True))
    for arm, found in grown.items():
        yield f"{_GROWN[arm]} {_change(found, corrected[id(found)])}{_of_the_text(arms)}."
    if beside and (ratios := [row for row in beside.ratios if row.ratio is not None]):
        first, last = ratios[0], ratios[-1]
        p = corrected[id(beside)]
        moves = "keeps its place"
        if p <= ALPHA and beside.nears is not None:
            moves = "moves nearer" if beside.nears > 0.5 else "falls back"
        yield (
            f"Beside uniform, phase {moves} along the answer: uniform is {first.ratio:.2g} times further from BF16 at "
            f"the first token and {last.ratio:.2g} times at tokens {last.start + 1} to {last.stop} ({_p(p)})."
        )


_GROWN = {"phase": "Prefill error (phase)", "decode-only": "Decode error (decode-only)"}


def _grown(arms: Arms, arm: str) -> Growth | None:
    divergence = arms[arm].divergence if arm in arms else None
    growth = divergence.growth if divergence else None
    return growth if growth and growth.p is not None and growth.ratio is not None else None


def _change(found: Growth, p: float) -> str:
    half = found.tokens // 2
    figure = f"{found.ratio:.2f} ± {found.ratio_se or 0:.2f} times that of the first {half}"
    word = "shows no trend"
    if p <= ALPHA and found.rises is not None:
        word = "grows" if found.rises > 0.5 else "fades"
    return f"{word} along the answer: in tokens {half + 1} to {found.tokens} it is {figure} ({_p(p)})"


def _of_the_text(arms: Arms) -> str:
    """How much of a trend is the text's own."""
    control = _grown(arms, CONTROL)
    return f"; for {CONTROL} {control.ratio:.2f} ± {control.ratio_se or 0:.2f} times" if control else ""


def _redraws(arms: Arms) -> Iterator[str]:
    """How much of an arm's divergence is chance."""
    for name, arm in arms.items():
        if (draw := arm.redraw) and draw.share is not None and arm.divergence:
            yield (
                f"{name}: another draw of the same error ({name}{OF_CONTROLS}, equal up to rounding) is "
                f"{draw.kld_mean:.2g} nats away where {REFERENCE} is {arm.divergence.kld_mean:.2g} away: about "
                f"{100 * draw.share:.0f} % of its divergence is chance of the draw, the rest is the format's."
            )


def _details(arms: Arms, rows: Rows) -> list[str]:
    told = [row for row in rows.values() if row.arm != CONTROL and (row.arm in ARMS or row.against != REFERENCE)]
    details = [_divergence(arms, row) for row in told]
    if (CONTROL, REFERENCE) in rows:
        details.append(_floor(rows[CONTROL, REFERENCE]))
    tasks, n = arms[REFERENCE].tasks, arms[REFERENCE].all.n
    details.append(
        f"Accuracy is pooled over {n} example{'s' * (n != 1)} of {len(tasks)} task{'s' * (len(tasks) != 1)}; p-values "
        f"are corrected for all tests of the run (Holm, alpha {ALPHA:g}), 95 % intervals are not."
    )
    return [detail for detail in details if detail]


def _divergence(arms: Arms, row: Judged) -> str | None:
    arm, figures = row.arm, arms[row.arm].divergence
    if figures is None or figures.kld_mean is None:
        unknown = f"{arm}: this engine cannot force answers, so its divergence is not known."
        return unknown if row.against == REFERENCE else None
    if row.kld_p is None:
        return f"{arm}: its divergence has no noise floor, since {_no_floor(arms)}."
    return f"{_distance(row)}."


def _no_floor(arms: Arms) -> str:
    if CONTROL not in arms:
        return f"{CONTROL} was not run: add it to the arms"
    return f"batches of one example have no other composition for {CONTROL}: take larger ones"


def _distance(row: Judged) -> str:
    """How far an arm is from the reference beside its baseline, and whether that is more than noise."""
    assert row.kld_p_holm is not None
    baseline = CONTROL if row.against == REFERENCE else row.against
    noise = "" if row.kld_p_holm <= ALPHA else ", too few examples to tell" if row.n < FEW else ", within the noise"
    return f"{row.arm} is {_further(row.kld_further, baseline)} ({_p(row.kld_p_holm)}{noise})"


def _further(share: float | None, baseline: str) -> str:
    """On how many examples an arm is further from the reference than its baseline; closer, where that is more."""
    if share is None:
        return f"as far from {REFERENCE} as {baseline} on every example"
    word, most = ("further from", share) if share >= 0.5 else ("closer to", 1 - share)
    return f"{word} {REFERENCE} than {baseline} on {100 * most:.1f} % of the examples in which the two differ"


def _floor(row: Judged) -> str:
    changed = row.right_to_wrong + row.wrong_to_right
    floor = f"{CONTROL}: another batch composition alone changes whether {changed} of {row.n} answers are right"
    if row.different:
        return f"{floor}, and in one direction: mistrust this engine's batching before any arm."
    return f"{floor}."


def _may(row: Judged, most: str) -> str:
    """What an undecided difference may be, and what would decide it."""
    if not row.margin:
        return "BF16 solves none of these examples, so none can be lost: choose easier ones"
    if row.examples_needed is None:
        return f"{most}; with fewer than {FEW} examples nothing can be told: take some hundred"
    return f"{most}; this run has {row.n} examples, about {row.examples_needed} are needed"


def _points(share: float) -> str:
    """A share in percentage points: 6.1 points, 0.28 points."""
    value = f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.1f}"
    return f"{value} point{'s' * (value != '1')}"


def _range(low: float, high: float) -> str:
    return f"95 %: {100 * low:.1f} to {100 * high:.1f}"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"
