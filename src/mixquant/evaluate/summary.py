"""From records to results: the one document that `mixquant eval` writes and `mixquant report` reads.

`summarize` is pure: the same records, in any order, give the same document to the byte. Every arm must hold the same
examples, since everything is paired; every figure comes with its error. Figures are rounded to six digits, far below
their errors; one that is not finite is null.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import mixquant
from mixquant.errors import InputError
from mixquant.evaluate import RESULTS_VERSION
from mixquant.evaluate.comparison import ALPHA, Scores, compare, decide
from mixquant.evaluate.distance import Pairs, distance, mean_kld
from mixquant.evaluate.metrics import estimate, ratio
from mixquant.evaluate.records import Record
from mixquant.evaluate.significance import sign_test, wilson
from mixquant.evaluate.verdict import MARGIN, judge, verdict
from mixquant.model.arms import CONTROL, REFERENCE


def summarize(records: Iterable[Record], run: Mapping[str, Any]) -> dict[str, Any]:
    """The results document, as plain JSON values.

    run: what is known without the records: `arms` ({name: {emulated, kernels, and by_layer where it was measured}}),
    and everything that goes into the document as it is: model, engine, device, versions, threads, command, format,
    tail, seeds, limit, suites, time. Raises InputError where an arm lacks examples or has divergences that are no
    numbers.
    """
    answers = _by_arm(records, list(run["arms"]))
    reference = answers[REFERENCE]
    pairs = {arm: list(zip(rows, reference, strict=True)) for arm, rows in answers.items()}
    lengths = [record.prompt_tokens for record in reference]
    document: dict[str, Any] = {
        "version": RESULTS_VERSION,
        "mixquant": mixquant.__version__,
        **{key: value for key, value in run.items() if key not in ("arms", "time")},
        "alpha": ALPHA,
        "margin": _margin(reference),
        "prompt_tokens": {"min": min(lengths), "median": median(lengths), "max": max(lengths)},
        "arms": {arm: _arm(arm, pairs[arm], facts) for arm, facts in run["arms"].items()},
        "comparisons": _comparisons({arm: _scores(rows) for arm, rows in answers.items()}, _margin(reference)),
    }
    document["noise_floor"] = _noise_floor(document["arms"])
    plain: dict[str, Any] = _plain(document)
    return plain | {"verdict": verdict(plain), "time": run["time"]}


def _by_arm(records: Iterable[Record], arms: Sequence[str]) -> dict[str, list[Record]]:
    """Each arm's records in the order of their examples."""
    if REFERENCE not in arms:
        raise InputError(f"There is no reference to compare with: add {REFERENCE} to the arms.")
    found: dict[str, dict[tuple[str, int, int, int], Record]] = {arm: {} for arm in arms}
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


def _arm(arm: str, pairs: Pairs, facts: Mapping[str, Any]) -> dict[str, Any]:
    divergence = None if arm == REFERENCE else distance(pairs)
    if divergence and "by_layer" in facts:
        divergence["by_layer"] = facts["by_layer"]
    return {
        "emulated": facts["emulated"],
        "kernels": facts["kernels"],
        "divergence": divergence,
        "tasks": {
            task: _score(group) | {"rungs": [_rung(rung) for rung in _group(group, "rung").values()]}
            for task, group in _group(pairs, "task").items()
        },
        "all": _score(pairs),
    }


def _group(pairs: Pairs, key: str) -> dict[Any, list[tuple[Record, Record]]]:
    """Pairs by one field of their records, in ascending order of it."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[getattr(pair[0], key)].append(pair)
    return dict(sorted(groups.items()))


def _score(pairs: Pairs) -> dict[str, Any]:
    """Accuracy and what has changed of it since the reference."""
    right = [record.right for record, _ in pairs]
    accuracy = estimate(right)
    recovery = ratio(right, [reference.right for _, reference in pairs])
    flips = _flips(pairs)
    seeds = {str(seed): estimate([r.right for r, _ in group]).mean for seed, group in _group(pairs, "seed").items()}
    return {
        "accuracy": accuracy.mean,
        "se": accuracy.se,
        "n": accuracy.n,
        "recovery": recovery.mean,
        "recovery_se": recovery.se,
        "flips": flips,
        "mcnemar_p": sign_test(flips["right_to_wrong"], flips["wrong_to_right"]),
        "seeds": seeds,
    }


def _flips(pairs: Pairs) -> dict[str, int]:
    return {
        "right_to_wrong": sum(reference.right and not record.right for record, reference in pairs),
        "wrong_to_right": sum(record.right and not reference.right for record, reference in pairs),
    }


def _rung(pairs: Pairs) -> dict[str, Any]:
    first, _ = pairs[0]
    solved = sum(record.right for record, _ in pairs)
    low, high = wilson(solved, len(pairs))
    kld = estimate([mean_kld(record.kld) for record, _ in pairs if record.kld is not None])
    return {
        "rung": first.rung,
        "label": first.label,
        "prompt_tokens": median(record.prompt_tokens for record, _ in pairs),
        "n": len(pairs),
        "accuracy": solved / len(pairs),
        "low": low,
        "high": high,
        "kld_mean": kld.mean,
        "kld_se": kld.se,
        **_flips(pairs),
    }


def _margin(reference: Sequence[Record]) -> float:
    """The loss of accuracy that is too small to matter."""
    return MARGIN * estimate([record.right for record in reference]).mean


def _comparisons(scores: Mapping[str, Scores], margin: float) -> list[dict[str, Any]]:
    """Every arm against the reference, and phase against uniform."""
    named = [(arm, REFERENCE) for arm in scores if arm != REFERENCE]
    if {"phase", "uniform"} <= scores.keys():
        named.append(("phase", "uniform"))
    floors = {arm: scores.get(CONTROL) if arm != CONTROL else None for arm, _ in named}
    comparisons = [compare(scores[arm], scores[against], floors[arm]) for arm, against in named]
    rows = zip(named, comparisons, decide(comparisons), strict=True)
    return [
        judge({"arm": arm, "against": against, "margin": margin, **asdict(comparison), **asdict(decision)})
        for (arm, against), comparison, decision in rows
    ]


def _noise_floor(arms: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a difference must exceed: how far the reference is from itself in another batch composition."""
    if CONTROL not in arms:
        return None
    score, divergence = arms[CONTROL]["all"], arms[CONTROL]["divergence"]
    return {
        "accuracy": abs(score["accuracy"] - arms[REFERENCE]["all"]["accuracy"]),
        "flips": sum(score["flips"].values()) / score["n"],
        **{key: divergence[key] for key in ("kld_mean", "kld_p99", "same_top1", "identical")},
    }


def _plain(value: Any) -> Any:
    """JSON values, floats to six digits, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") + 0.0 if math.isfinite(value) else None  # + 0.0: no minus zero
    return value
