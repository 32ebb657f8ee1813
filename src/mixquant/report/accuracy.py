"""From results to the sections about answers: the arms, what is right on each rung, and what has flipped.

The order is that in which doubts come up. How do the arms compare, and is the difference real? Where on the ladder of
difficulty does it begin? Do answers change in one direction, or both ways as noise does?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mixquant.evaluate.results import Arm, Flipped, Judged, Results, Rung, Score
from mixquant.policy import CONTROL, REFERENCE
from mixquant.report import palette
from mixquant.report.divergence import quantile
from mixquant.report.lines import KLD, kld_of, lines
from mixquant.report.numerals import NONE, count, kernel_words, kld, p_value, percent, signed_points, within
from mixquant.report.page import (
    Axis,
    Block,
    Charts,
    Curves,
    Difference,
    Differences,
    Flip,
    Flips,
    Line,
    Point,
    Row,
    Section,
    Table,
    Text,
    Texts,
)

Arms = Mapping[str, Arm]


def sections(results: Results) -> Iterator[Section]:
    """The arms, the ladder, and flips where there is an arm besides bf16."""
    yield _arms(results)
    yield _ladder(results.arms)
    if len(results.arms) > 1:
        yield _flips(results)


def _arms(results: Results) -> Section:
    lead = "bf16 is the reference; ± is one standard error. Recovery is an arm's accuracy as a share of bf16's."
    if any(arm.emulated for arm in results.arms.values()):
        lead += " An emulated kernel computes its format exactly on other hardware: it shows quality and has no speed."
    if CONTROL in results.arms and not results.noise_floor:
        lead += f" Batches of one example have no other composition: {CONTROL} is bf16 again, and no noise floor."
    easier = any(arm.nearly for arm in results.arms.values())
    rows = [_arm_row(name, arm, results.noise_floor is not None, easier) for name, arm in palette.items(results.arms)]
    columns = ["Arm and its kernels", "Accuracy", "Recovery", "KLD, nats", "KLD p99", "Same top-1"]
    if easier:
        lead += " The easier reading asks less of an answer: of a function call, its name alone."
        columns.insert(2, "Easier reading")
    table = Table(caption="Arms, all tasks together", columns=columns, rows=rows, cards=True)
    return Section(anchor="arms", title="The arms", lead=lead, blocks=[table, *_comparisons(results)])


def _arm_row(name: str, arm: Arm, floor: bool, easier: bool) -> Row:
    score, far = arm.all, arm.divergence
    divergence = [NONE] * 3
    if far:
        divergence = [
            kld(far.kld_mean, far.kld_se),
            quantile(far.kld_p99, far.intervals.kld_p99),
            percent(far.same_top1, far.same_top1_se),
        ]
    cells = [percent(score.accuracy, score.se), _recovery(name, score), *divergence]
    if easier:
        cells.insert(1, percent(arm.nearly.accuracy, arm.nearly.se) if arm.nearly else NONE)
    tag = "emulated" if arm.emulated else "noise floor" if name == CONTROL and floor else ""
    return Row(head=name, cells=cells, arm=name, tag=tag, note=kernel_words(arm.kernels))


def _recovery(arm: str, score: Score) -> str:
    return percent(score.recovery, None if arm == REFERENCE else score.recovery_se)


def _comparisons(results: Results) -> Iterator[Charts | Table]:
    if not results.comparisons:
        return
    columns = ["Pair", "Outcome", "Accuracy, points", "p, accuracy", "KLD beyond baseline, nats", "Further", "p, KLD"]
    caption = (
        "Is the difference real? Paired by example, with 95 % intervals; p-values are corrected for all tests of the "
        "run (Holm). The baseline of the divergence is the other arm, or bf16-control where that is bf16. Further: "
        "on how many examples the arm is further from bf16 than its baseline."
    )
    rows = [_comparison_row(pair) for pair in results.comparisons]
    yield Table(caption=caption, columns=columns, rows=rows, cards=True)
    differences = [
        Difference(
            arm=pair.arm, against=pair.against, mean=pair.accuracy_difference, low=pair.low, high=pair.high,
            outcome=_outcome(pair), equal=pair.kind in EQUAL,
        )
        for pair in results.comparisons
    ]  # fmt: skip
    title = "Differences in accuracy, with 95 % intervals"
    yield Charts(charts=[Differences(title=title, rows=differences, margin=results.margin)])


_OUTCOMES = {
    "loss": "a loss",
    "gain": "a gain",
    "no-loss": "no loss beyond the margin",
    "no-gain": "no gain beyond the margin",
    "within-noise-floor": "within the noise floor",
    "undecided": "undecided",
}
EQUAL = ("no-loss", "no-gain", "within-noise-floor")
"""Kinds of comparisons that count as equal."""


def _outcome(pair: Judged) -> str:
    """In words; a difference that is real and small is both."""
    small = {"loss": pair.low > -pair.margin, "gain": pair.high < pair.margin}.get(pair.kind, False)
    return _OUTCOMES.get(pair.kind, pair.kind) + " within the margin" * small


def _comparison_row(pair: Judged) -> Row:
    divergence = NONE
    if pair.kld_difference is not None:
        divergence = within("kld", pair.kld_difference, pair.kld_low, pair.kld_high)
    cells = [
        _outcome(pair),
        f"{signed_points(pair.accuracy_difference)} [{signed_points(pair.low)}, {signed_points(pair.high)}]",
        p_value(pair.mcnemar_p_holm),
        divergence,
        percent(pair.kld_further),
        p_value(pair.kld_p_holm),
    ]
    return Row(head=f"{pair.arm} against {pair.against}", cells=cells, arm=pair.arm)


def _ladder(arms: Arms) -> Section:
    charts = [chart for task in arms[REFERENCE].tasks for chart in _ladder_charts(arms, task)]
    lead = (
        "Each point is one rung of a task; the built-in ladders were fixed on bf16's accuracy alone. "
        "Bands are 95 % intervals: Wilson's for accuracy, 1.96 standard errors for the divergence; one that reaches "
        "down to the axis includes zero."
    )
    blocks: list[Block] = [Charts(charts=charts), _tasks(arms)]
    return Section(anchor="ladder", title="Along the ladder", lead=lead, blocks=blocks)


def _ladder_charts(arms: Arms, task: str) -> Iterator[Curves]:
    """A task's accuracy by prompt length, and beside it its divergence where it was measured."""
    rungs = {
        arm: sorted(found.tasks[task].rungs, key=lambda rung: rung.prompt_tokens) for arm, found in palette.items(arms)
    }
    x = Axis(label="prompt tokens of the rung, median", unit="count")
    right = [
        Line(
            arm=arm,
            points=[Point(x=r.prompt_tokens, y=r.accuracy, band=(r.low, r.high), name=_rung_name(r)) for r in found],
        )
        for arm, found in rungs.items()
    ]
    yield Curves(title=f"{task}, accuracy", x=x, y=Axis(label="answers right", unit="percent"), lines=right)
    if far := lines(rungs, lambda rung: rung.prompt_tokens, kld_of, _rung_name):
        yield Curves(title=f"{task}, divergence", x=x, y=KLD, lines=far)


def _rung_name(rung: Rung) -> str:
    tokens = f"{count(rung.prompt_tokens)} tokens"
    return f"{rung.label} ({tokens})" if rung.label else tokens


def _tasks(arms: Arms) -> Table:
    """Every task and arm: accuracy, recovery, data seeds, flips."""
    rows = [
        _task_row(task, name, arm.tasks[task]) for task in arms[REFERENCE].tasks for name, arm in palette.items(arms)
    ]
    columns = ["Task and arm", "Accuracy", "Examples", "Recovery", "Each data seed", "Flips", "McNemar p"]
    return Table(caption="Every task and arm", columns=columns, rows=rows, folded=True)


def _task_row(task: str, arm: str, score: Score) -> Row:
    cells = [
        percent(score.accuracy, score.se),
        count(score.n),
        _recovery(arm, score),
        " / ".join(f"{100 * share:.1f}" for _, share in sorted(score.seeds.items())),
        f"{score.flips.right_to_wrong} to wrong, {score.flips.wrong_to_right} to right",
        p_value(score.mcnemar_p),
    ]
    return Row(head=f"{task}, {arm}", cells=cells, arm=arm)


def _flips(results: Results) -> Section:
    compared = [(name, arm) for name, arm in palette.items(results.arms) if name != REFERENCE]
    rows = {"all tasks": [_flip(name, arm.all) for name, arm in compared]}
    rows |= {task: [_flip(name, arm.tasks[task]) for name, arm in compared] for task in results.reference.tasks}
    widest = max(max(r.right_to_wrong, r.wrong_to_right) / r.n for found in rows.values() for r in found)
    charts = [Flips(title=f"Flips, {title}", rows=found, widest=widest) for title, found in rows.items()]
    lead = (
        "Answers whose correctness is not bf16's. Noise moves as many one way as the other; a loss moves more to the "
        "left. Numbers at the bars are examples, p is McNemar's exact test, "
        "not corrected for the number of tests."
    )
    blocks: list[Block] = [Charts(charts=charts)]
    if results.flipped:
        blocks.append(Texts(texts=[_text(found) for found in results.flipped]))
    return Section(anchor="flips", title="Flips", lead=lead, blocks=blocks)


def _flip(arm: str, score: Score) -> Flip:
    flips = score.flips
    return Flip(arm, flips.right_to_wrong, flips.wrong_to_right, score.n, score.mcnemar_p)


def _text(found: Flipped) -> Text:
    """A flipped example to be read."""
    way = "right to wrong" if found.right_to_wrong else "wrong to right"
    label = f" ({found.label})" if found.label else ""
    right, wrong = "right", "wrong"
    ours, theirs = (wrong, right) if found.right_to_wrong else (right, wrong)
    parts = [(f"bf16's answer, {theirs}", found.reference), (f"{found.arm}'s answer, {ours}", found.answer)]
    if found.prompt is not None:
        parts.insert(0, ("Prompt", found.prompt))
    title = f"{found.arm}, {way}: {found.task}{label}, data seed {found.seed}, example {found.index}"
    return Text(title=title, parts=parts)
