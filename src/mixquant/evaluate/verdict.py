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

`verdict` reads nothing but the document's comparisons and arms, so a report can be judged again from its file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mixquant.evaluate.comparison import ALPHA
from mixquant.evaluate.significance import examples_needed
from mixquant.model.arms import CONTROL, REFERENCE

MARGIN = 0.01
"""Share of the reference's right answers whose loss is too small to matter."""

EASY = 0.99
"""Accuracy of the reference from which on the examples may be too easy to tell arms apart."""

FEW = 50
"""Examples below which a run cannot even say how many it would take."""

Row = Mapping[str, Any]
"""One of the document's comparisons."""

SMALL = f"{100 * MARGIN:g} % of BF16's right answers"

SUBJECTS = {
    "phase": "Quantizing the prompt (phase)",
    "uniform": "Quantizing everything (uniform)",
    "decode-only": "Quantizing only the answer (decode-only)",
}


def judge(row: Row) -> dict[str, Any]:
    """A comparison, with its `margin` in points of accuracy, and its `kind`; the `examples_needed` if undecided."""
    kind = _against_reference(row) if row["against"] == REFERENCE else _between_arms(row)
    needed = None
    if kind == "undecided" and row["margin"] and row["n"] >= FEW:
        changed = row["wrong_to_right"], row["right_to_wrong"]
        wins, losses = changed if row["against"] == REFERENCE else reversed(changed)
        needed = examples_needed(wins, losses, row["n"], row["margin"])
    return {**row, "kind": kind, "examples_needed": needed}


def _against_reference(row: Row) -> str:
    if row["mcnemar_p_holm"] <= ALPHA:
        return "loss" if row["accuracy_difference"] < 0 else "gain"
    if row["low"] <= -row["margin"]:
        return "undecided"
    within = row["kld_p_holm"] is not None and row["kld_p_holm"] > ALPHA
    return "within-noise-floor" if within else "no-loss"


def _between_arms(row: Row) -> str:
    if row["mcnemar_p_holm"] <= ALPHA:
        return "loss" if row["accuracy_difference"] < 0 else "gain"
    return "undecided" if row["high"] >= row["margin"] else "no-gain"


def verdict(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document's verdict: a headline, its parts, and details, all of them sentences; `outcome` in a word.

    outcome: phase-helps, uniform-is-enough, phase-does-not-help, undecided, or None where an arm is missing.
    """
    rows = {(row["arm"], row["against"]): row for row in document["comparisons"]}
    costs = {arm: _cost(rows[arm, REFERENCE]) for arm in SUBJECTS if (arm, REFERENCE) in rows}
    outcome, against = None, None
    if ("phase", "uniform") in rows:
        outcome = _outcome(rows["phase", "uniform"], rows["uniform", REFERENCE])
        against = _OUTCOMES[outcome](rows["phase", "uniform"])
    headline = [costs.get("phase"), costs.get("uniform"), against, _too_easy(document, outcome)]
    return {
        "sentence": " ".join(filter(None, headline)) or "No quantized arm was run: add phase and uniform to the arms.",
        "outcome": outcome,
        "phase": costs.get("phase"),
        "uniform": costs.get("uniform"),
        "phase_against_uniform": against,
        "details": [sentence for arm, sentence in costs.items() if arm == "decode-only"] + _details(document, rows),
    }


def _outcome(phase: Row, uniform: Row) -> str:
    """phase: its comparison with uniform. uniform: its comparison with the reference."""
    if phase["kind"] == "gain":
        return "phase-helps"
    if phase["kind"] != "loss" and uniform["low"] > -uniform["margin"]:
        return "uniform-is-enough"
    return "undecided" if phase["kind"] == "undecided" else "phase-does-not-help"


def _cost(row: Row) -> str:
    subject, at_most = SUBJECTS[row["arm"]], _points(max(0.0, -row["low"]))
    difference = row["accuracy_difference"]
    if row["kind"] == "loss":
        small = f", less than {SMALL}" if row["low"] > -row["margin"] else ""
        return f"{subject} costs {_points(-difference)} of accuracy ({_range(-row['high'], -row['low'])}){small}."
    if row["kind"] == "gain":
        return f"{subject} gains {_points(difference)} of accuracy ({_range(row['low'], row['high'])})."
    if row["kind"] == "within-noise-floor":
        return (
            f"{subject} is within the noise floor: not measurably further from BF16 than BF16 in another batch "
            f"(at most {at_most} of accuracy with 95 % confidence)."
        )
    if row["kind"] == "no-loss":
        return f"{subject} costs nothing that this run can see (at most {at_most} of accuracy with 95 % confidence)."
    return f"{subject} is undecided: it may cost up to {at_most} of accuracy; {_needed(row)}."


def _helps(row: Row) -> str:
    small = f", but less than {SMALL}" if row["high"] < row["margin"] else ""
    return (
        f"Phase is better than uniform by {_points(row['accuracy_difference'])} "
        f"({_range(row['low'], row['high'])}, {_p(row['mcnemar_p_holm'])}): the difference is real{small}."
    )


def _enough(row: Row) -> str:
    return (
        f"Uniform is enough here: it loses less than {SMALL}, and phase is not shown to be better (by at most "
        f"{_points(max(0.0, row['high']))})."
    )


def _no_help(row: Row) -> str:
    if row["kind"] == "loss":
        return f"Phase does not help here: it is worse than uniform by {_points(-row['accuracy_difference'])}."
    return f"Phase does not help here: it is better than uniform by at most {_points(max(0.0, row['high']))}."


def _open(row: Row) -> str:
    return (
        f"Whether phase is better than uniform is undecided: it may be by up to {_points(row['high'])}; {_needed(row)}."
    )


_OUTCOMES = {
    "phase-helps": _helps,
    "uniform-is-enough": _enough,
    "phase-does-not-help": _no_help,
    "undecided": _open,
}


def _too_easy(document: Mapping[str, Any], outcome: str | None) -> str | None:
    accuracy = document["arms"][REFERENCE]["all"]["accuracy"]
    if accuracy < EASY or outcome not in ("uniform-is-enough", "phase-does-not-help"):
        return None
    return f"But BF16 solves {100 * accuracy:.4g} % of these examples: harder ones may tell the arms apart."


def _details(document: Mapping[str, Any], rows: Mapping[tuple[str, str], Row]) -> list[str]:
    details = [_divergence(document, row) for row in rows.values() if row["arm"] != CONTROL]
    if (CONTROL, REFERENCE) in rows:
        details.append(_floor(rows[CONTROL, REFERENCE]))
    tasks, n = document["arms"][REFERENCE]["tasks"], document["arms"][REFERENCE]["all"]["n"]
    details.append(
        f"Accuracy is pooled over {n} examples of {len(tasks)} task{'s' * (len(tasks) != 1)}; p-values are corrected "
        f"for all tests of the run (Holm, alpha {ALPHA:g}), 95 % intervals are not."
    )
    return [detail for detail in details if detail]


def _divergence(document: Mapping[str, Any], row: Row) -> str | None:
    arm, against, figures = row["arm"], row["against"], document["arms"][row["arm"]]["divergence"]
    if figures["kld_mean"] is None:
        return (
            f"{arm}: this engine cannot force answers, so its divergence is not known."
            if against == REFERENCE
            else None
        )
    if row["kld_p"] is None:
        return f"{arm}: its divergence has no noise floor, since {CONTROL} was not run: add it to the arms."
    baseline = CONTROL if against == REFERENCE else against
    real = "" if row["kld_p_holm"] <= ALPHA else ", within the noise"
    return f"{arm} is {_further(row['kld_further'], baseline)} ({_p(row['kld_p_holm'])}{real})."


def _further(share: float | None, baseline: str) -> str:
    """On how many examples an arm is further from the reference than its baseline; closer, where that is more."""
    if share is None:
        return f"as far from {REFERENCE} as {baseline} on every example"
    word, most = ("further from", share) if share >= 0.5 else ("closer to", 1 - share)
    return f"{word} {REFERENCE} than {baseline} on {100 * most:.1f} % of the examples in which the two differ"


def _floor(row: Row) -> str:
    changed = row["right_to_wrong"] + row["wrong_to_right"]
    floor = f"{CONTROL}: another batch composition alone changes whether {changed} of {row['n']} answers are right"
    if row["different"]:
        return f"{floor}, and in one direction: mistrust this engine's batching before any arm."
    return f"{floor}."


def _needed(row: Row) -> str:
    if not row["margin"]:
        return "BF16 solves none of these examples, so none can be lost: choose easier ones"
    if row["examples_needed"] is None:
        return f"with fewer than {FEW} examples nothing can be told: take some hundred"
    return f"this run has {row['n']} examples, about {row['examples_needed']} are needed"


def _points(share: float) -> str:
    """A share in percentage points: 6.1 points, 0.28 points."""
    value = f"{100 * share:.2g}" if share < 0.1 else f"{100 * share:.1f}"
    return f"{value} point{'s' * (value != '1')}"


def _range(low: float, high: float) -> str:
    return f"95 %: {100 * low:.1f} to {100 * high:.1f}"


def _p(value: float) -> str:
    return f"p = {value:.2g}" if value >= 1e-4 else "p < 0.0001"
