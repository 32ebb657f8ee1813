"""Along the answer, and from draw to draw: does an error fade or grow, and how much of it is chance?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import pytest

from mixquant.evaluate.distance import along, redraw
from mixquant.evaluate.metrics import estimate
from mixquant.evaluate.records import Record

from .synthetic import Damage, run, summarized

Shape = Callable[[float], float]
"""From the place in the answer, 0 to 1, to how large the divergence is there."""

TOKENS = 32


def flat(place: float) -> float:
    return 1.0


def fades(place: float) -> float:
    return 2.0 - 1.5 * place


def grows(place: float) -> float:
    return 0.5 + place


def written(shapes: Mapping[str, Shape], n: int = 120, tokens: int = TOKENS) -> list[Record]:
    """Answers of random hardness, on which each arm diverges by its shape."""
    rng, made = Random(3), []
    for index in range(n):
        same: dict[str, Any] = {
            "task": "t", "rung": 0, "seed": 0, "index": index, "label": "", "prompt_tokens": 100, "text": "",
            "right": index % 3 > 0, "answer": list(range(tokens)),
        }  # fmt: skip
        made.append(Record(arm="bf16", **same))
        hardness = [rng.lognormvariate(0, 1) for _ in range(tokens)]
        for arm, shape in shapes.items():
            kld = [1e-2 * h * shape(i / tokens) * rng.uniform(0.5, 1.5) for i, h in enumerate(hardness)]
            made.append(Record(arm=arm, kld=kld, flips=[], **same))
    return made


def details(shapes: Mapping[str, Shape]) -> list[str]:
    found = summarized(written(shapes), run(dict.fromkeys(shapes, Damage())))["verdict"]["details"]
    return [sentence for sentence in found if "along the answer" in sentence]


def test_prefill_error_that_fades_and_decode_error_that_accumulates_are_called_so() -> None:
    prefill, decode, beside = details({"bf16-control": flat, "uniform": flat, "phase": fades, "decode-only": grows})
    assert prefill.startswith("Prefill error (phase) fades along the answer: in tokens 17 to 32 it is 0.")
    assert decode.startswith("Decode error (decode-only) grows along the answer: in tokens 17 to 32 it is 1.")
    assert "; for bf16-control 1.0" in prefill or "; for bf16-control 0.9" in prefill
    assert beside.startswith("Beside uniform, phase moves nearer along the answer: uniform is 0.")


def test_what_is_flat_shows_no_trend() -> None:
    sentences = details(dict.fromkeys(["bf16-control", "uniform", "phase", "decode-only"], flat))
    assert [sentence.partition(" along")[0] for sentence in sentences] == [
        "Prefill error (phase) shows no trend",
        "Decode error (decode-only) shows no trend",
        "Beside uniform, phase keeps its place",
    ]


def test_the_other_way_round_is_told_as_it_is() -> None:
    sentences = details({"bf16-control": flat, "uniform": flat, "phase": grows, "decode-only": fades})
    assert [sentence.partition(" along")[0] for sentence in sentences] == [
        "Prefill error (phase) grows",
        "Decode error (decode-only) fades",
        "Beside uniform, phase falls back",
    ]


def test_a_trend_of_the_text_cancels_beside_uniform() -> None:
    *_, beside = details({"bf16-control": fades, "uniform": fades, "phase": fades, "decode-only": fades})
    assert beside.startswith("Beside uniform, phase keeps its place")


def test_ratios_along_the_answer_by_hand() -> None:
    made = written({"uniform": flat, "phase": fades})
    ours, theirs = ([r for r in made if r.arm == arm] for arm in ("phase", "uniform"))
    found = along(ours, theirs)
    assert found is not None
    assert (found.tokens, found.examples) == (TOKENS, 120)
    assert [(row.start, row.stop) for row in found.ratios] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    last = found.ratios[-1]
    sums = [sum(math.fsum(r.kld[16:32]) for r in rows if r.kld) for rows in (theirs, ours)]
    assert last.ratio == pytest.approx(sums[0] / sums[1], rel=1e-5)
    assert last.low is not None
    assert last.high is not None
    assert last.ratio is not None
    assert last.low < last.ratio < last.high
    nearer = 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.kld
        assert b.kld
        nearer += math.fsum(a.kld[16:]) / math.fsum(b.kld[16:]) < math.fsum(a.kld[:16]) / math.fsum(b.kld[:16])
    assert found.nears == nearer / 120


def test_answers_of_one_token_have_no_halves() -> None:
    made = written({"uniform": flat, "phase": flat}, tokens=1)
    assert along([r for r in made if r.arm == "phase"], [r for r in made if r.arm == "uniform"]) is None


def drawn(apart: float) -> list[Record]:
    """Answers of an arm and of its control, whose distance from each other is this share of the arm's own."""
    made = []
    for record in written({"uniform": flat, "phase": flat}):
        made.append(record)
        if record.arm == "phase":
            assert record.kld
            copied = vars(record) | {"arm": "phase-control", "redraw": [apart * value for value in record.kld]}
            made.append(Record(**copied))
    return made


@pytest.mark.parametrize("apart", [0.02, 1.0])
def test_how_much_of_a_divergence_is_chance(apart: float) -> None:
    made = drawn(apart)
    arm, control = ([r for r in made if r.arm == name] for name in ("phase", "phase-control"))
    found = redraw(control, arm)
    assert found is not None
    assert found.share == pytest.approx(apart / 2, rel=1e-5)
    assert found.shift == 0
    assert found.kld_mean == pytest.approx(estimate([apart * sum(r.kld) / TOKENS for r in arm if r.kld]).mean, rel=1e-5)
    assert redraw([], arm) is None


def test_a_control_is_no_arm_of_its_own_in_the_document() -> None:
    facts = run({"uniform": Damage(), "phase": Damage()})
    facts["arms"]["phase-control"] = facts["arms"]["phase"]
    document = summarized(drawn(1.0), facts)
    assert list(document["arms"]) == ["bf16", "uniform", "phase"]
    assert document["arms"]["phase"]["redraw"]["share"] == pytest.approx(0.5)
    assert "redraw" not in document["arms"]["uniform"]
    said = [sentence for sentence in document["verdict"]["details"] if sentence.startswith("phase: another draw")]
    assert len(said) == 1
    assert "about 50 % of its divergence is chance of the draw" in said[0]
