"""From records to results: the one document that `mixquant eval` writes and `mixquant report` reads.

`summarize` is pure: the same records, in any order, give the same document to the byte. Every arm must hold the same
examples, since everything is paired; every figure comes with its error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import mixquant
from mixquant.errors import InputError
from mixquant.evaluate.comparison import ALPHA, Scores, compare, decide
from mixquant.evaluate.distance import Pairs, along, distance, mean_kld, redraw
from mixquant.evaluate.metrics import estimate, ratio
from mixquant.evaluate.records import Record
from mixquant.evaluate.results import (
    VERSION,
    Along,
    Arm,
    Flipped,
    Flips,
    Judged,
    Layer,
    Lengths,
    NoiseFloor,
    Results,
    Rung,
    Score,
    Setting,
    Task,
)
from mixquant.evaluate.significance import sign_test, wilson
from mixquant.evaluate.verdict import MARGIN, judge, verdict
from mixquant.policy import ARMS, CONTROL, OF_CONTROLS, REFERENCE, controlled

Example = tuple[str, int, int, int]
"""What `Record.example` is: task, rung, seed, index."""

READABLE = 3
"""Flipped examples of each arm and direction whose texts are kept in the document."""

LONGEST = 1500
"""Characters of a text that are kept: its beginning and its end."""


def summarize(
    records: Iterable[Record], run: Mapping[str, Any], prompt: Callable[[Example], str | None] = lambda _: None
) -> Results:
    """The results of these records.

    run: what is known without them: `arms` ({name: {emulated, kernels, and by_layer where it was measured}}), and
    everything that goes into the document as it is: model, engine, device, versions, threads, command, format, tail,
    seeds, limit, suites, time. prompt: an example's, to be read where its answer has flipped. Raises InputError where
    an arm lacks examples or has divergences that are no numbers.
    """
    answers = _by_arm(records, list(run["arms"]))
    reference = answers[REFERENCE]
    pairs = {arm: list(zip(rows, reference, strict=True)) for arm, rows in answers.items()}
    lengths = [record.prompt_tokens for record in reference]
    margin = MARGIN * estimate([record.right for record in reference]).mean
    shown = [arm for arm in run["arms"] if controlled(arm) in (None, REFERENCE)]
    arms = {arm: _arm(arm, answers, pairs[arm], run["arms"][arm]) for arm in shown}
    floor = _has_floor(arms, run.get("batch_size"))
    comparisons = _comparisons({arm: _scores(answers[arm]) for arm in shown}, margin, floor)
    beside = _along(answers)
    return Results(
        version=VERSION,
        **{"mixquant": mixquant.__version__, **{key: value for key, value in run.items() if key != "arms"}},
        alpha=ALPHA,
        margin=margin,
        prompt_tokens=Lengths(min=min(lengths), median=median(lengths), max=max(lengths)),
        arms=arms,
        comparisons=comparisons,
        noise_floor=_noise_floor(arms) if floor else None,
        flipped=list(_flipped({arm: pairs[arm] for arm in shown}, prompt)),
        along=beside,
        verdict=verdict(arms, comparisons, beside),
    )


def _along(answers: Mapping[str, list[Record]]) -> dict[str, Along]:
    """Every quantized arm but controls beside uniform."""
    others = [arm for arm in answers if arm not in (REFERENCE, "uniform") and controlled(arm) is None]
    found = {arm: along(answers[arm], answers["uniform"]) for arm in others if "uniform" in answers}
    return {arm: beside for arm, beside in found.items() if beside}


def _by_arm(records: Iterable[Record], arms: Sequence[str]) -> dict[str, list[Record]]:
    """Each arm's records in the order of their examples."""
    if REFERENCE not in arms:
        raise InputError(f"There is no reference to compare with: add {REFERENCE} to the arms.")
    found: dict[str, dict[Example, Record]] = {arm: {} for arm in arms}
    for record in records:
        if record.kld is not None and not all(map(math.isfinite, record.kld)):
            raise InputError(
                f"Arm {record.arm} has logits that are no numbers (task {record.task}, rung {record.rung}, seed "
                f"{record.seed}, example {record.index}): leave this arm out, or choose another format."
            )
        found[record.arm][record.example] = record
    examples = sorted(found[REFERENCE])
    for arm, rows in found.items():
        if not rows or sorted(rows) != examples:
            raise InputError(
                f"Arm {arm} has {len(rows)} examples where {REFERENCE} has {len(examples)}, or other ones: run the "
                "same command again to resume it."
            )
    return {arm: [rows[example] for example in examples] for arm, rows in found.items()}


def _scores(rows: Sequence[Record]) -> Scores:
    klds = [mean_kld(record.kld) for record in rows if record.kld is not None]
    return Scores([record.right for record in rows], klds if len(klds) == len(rows) else None)


def _arm(arm: str, answers: Mapping[str, list[Record]], pairs: Pairs, facts: Mapping[str, Any]) -> Arm:
    divergence = None if arm == REFERENCE else distance(pairs)
    if divergence and "by_layer" in facts:
        divergence = divergence.model_copy(update={"by_layer": [Layer(**row) for row in facts["by_layer"]]})
    return Arm(
        emulated=facts["emulated"],
        kernels=facts["kernels"],
        divergence=divergence,
        tasks={task: _task(group) for task, group in _group(pairs, "task").items()},
        all=_score(pairs),
        **_found(
            nearly=_nearly(pairs), policy=_setting(facts.get("policy")),
            redraw=redraw(answers.get(arm + OF_CONTROLS, ()), answers[arm]),
        ),
    )  # fmt: skip


def _found(**figures: Any) -> dict[str, Any]:
    """Those that there are: a key that has no figure is not written."""
    return {name: figure for name, figure in figures.items() if figure is not None}


def _setting(policy: Mapping[str, Any] | None) -> Setting | None:
    return None if policy is None else Setting(**{key: policy[key] for key in Setting.model_fields if key in policy})


def _nearly(pairs: Pairs) -> Score | None:
    """The score of the easier reading, over the examples that have one."""
    read = [
        (replace(record, right=record.nearly), replace(reference, right=reference.nearly))
        for record, reference in pairs
        if record.nearly is not None and reference.nearly is not None
    ]
    return _score(read) if read else None


def _group(pairs: Pairs, key: str) -> dict[Any, list[tuple[Record, Record]]]:
    """Pairs by one field of their records, in ascending order of it."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[getattr(pair[0], key)].append(pair)
    return dict(sorted(groups.items()))


def _task(pairs: Pairs) -> Task:
    rungs = [_rung(rung) for rung in _group(pairs, "rung").values()]
    return Task(**dict(_score(pairs)), rungs=rungs, **_found(nearly=_nearly(pairs)))


def _score(pairs: Pairs) -> Score:
    """Accuracy and what has changed of it since the reference."""
    right = [record.right for record, _ in pairs]
    accuracy = estimate(right)
    recovery = ratio(right, [reference.right for _, reference in pairs])
    flips = _flips(pairs)
    return Score(
        accuracy=accuracy.mean,
        se=accuracy.se,
        n=accuracy.n,
        recovery=recovery.mean,
        recovery_se=recovery.se,
        flips=flips,
        mcnemar_p=sign_test(flips.right_to_wrong, flips.wrong_to_right),
        seeds={str(seed): estimate([r.right for r, _ in group]).mean for seed, group in _group(pairs, "seed").items()},
    )


def _flips(pairs: Pairs) -> Flips:
    return Flips(
        right_to_wrong=sum(reference.right and not record.right for record, reference in pairs),
        wrong_to_right=sum(record.right and not reference.right for record, reference in pairs),
    )


def _rung(pairs: Pairs) -> Rung:
    first, _ = pairs[0]
    solved = sum(record.right for record, _ in pairs)
    low, high = wilson(solved, len(pairs))
    kld = estimate([mean_kld(record.kld) for record, _ in pairs if record.kld is not None])
    return Rung(
        rung=first.rung,
        label=first.label,
        prompt_tokens=median(record.prompt_tokens for record, _ in pairs),
        n=len(pairs),
        accuracy=solved / len(pairs),
        low=low,
        high=high,
        kld_mean=kld.mean,
        kld_se=kld.se,
        **dict(_flips(pairs)),
        **_found(nearly=(nearly := _nearly(pairs)) and nearly.accuracy),
    )


def _comparisons(scores: Mapping[str, Scores], margin: float, floor: bool) -> list[Judged]:
    """Every arm against the reference, phase against uniform, and what is neither against phase.

    Controls of quantized arms are compared with these alone (`Redraw`). floor: whether the control is one.
    """
    named = [(arm, REFERENCE) for arm in scores if arm != REFERENCE]
    if "phase" in scores:
        named += [("phase", "uniform")] if "uniform" in scores else []
        named += [(arm, "phase") for arm in scores if arm not in ARMS]
    floors = {arm: scores[CONTROL] if floor and arm != CONTROL else None for arm, _ in named}
    decided = decide([compare(scores[arm], scores[against], floors[arm]) for arm, against in named])
    return [judge(*pair, row, margin) for pair, row in zip(named, decided, strict=True)]


def _has_floor(arms: Mapping[str, Arm], batch_size: int | None) -> bool:
    """Whether the control ran in other batches than the reference: a batch of one example has no other composition."""
    if CONTROL not in arms:
        return False
    alone = batch_size == 1 or all(rung.n == 1 for task in arms[CONTROL].tasks.values() for rung in task.rungs)
    divergence = arms[CONTROL].divergence
    return not alone or bool(divergence and divergence.kld_max)


def _noise_floor(arms: Mapping[str, Arm]) -> NoiseFloor:
    """What a difference must exceed: how far the reference is from itself in another batch composition."""
    score, divergence = arms[CONTROL].all, arms[CONTROL].divergence
    assert divergence
    return NoiseFloor(
        accuracy=abs(score.accuracy - arms[REFERENCE].all.accuracy),
        flips=(score.flips.right_to_wrong + score.flips.wrong_to_right) / score.n,
        kld_mean=divergence.kld_mean,
        kld_p99=divergence.kld_p99,
        same_top1=divergence.same_top1,
        identical=divergence.identical,
    )


def _flipped(pairs: Mapping[str, Pairs], prompt: Callable[[Example], str | None]) -> Iterator[Flipped]:
    """For each arm and direction a few examples to read, spread evenly over all of them."""
    for arm, rows in pairs.items():
        for lost in (True, False):
            found = [pair for pair in rows if (pair[0].right, pair[1].right) == (not lost, lost)]
            for record, reference in found[:: max(1, len(found) // READABLE)][:READABLE]:
                asked = prompt(record.example)
                yield Flipped(
                    arm=arm, task=record.task, rung=record.rung, seed=record.seed, index=record.index,
                    label=record.label, right_to_wrong=lost, prompt=None if asked is None else _cut(asked),
                    reference=_cut(reference.text), answer=_cut(record.text),
                )  # fmt: skip


def _cut(text: str) -> str:
    """A text, or its beginning and its end."""
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}\n[...]\n{text[-half:]}"
