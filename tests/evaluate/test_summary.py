"""The results document: pure, paired, complete, and its figures recomputed by hand from the records."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, sem

from mixquant.errors import InputError
from mixquant.evaluate.records import Record

from .synthetic import USUAL, Damage, records, run, summarized

N = 360


@pytest.fixture(scope="module")
def made() -> list[Record]:
    return records(N)


@pytest.fixture(scope="module")
def document(made: list[Record]) -> dict[str, Any]:
    return summarized(made, run())


def of(made: list[Record], arm: str) -> list[Record]:
    return sorted((record for record in made if record.arm == arm), key=lambda record: record.example)


def test_the_records_order_changes_no_byte(made: list[Record], document: dict[str, Any]) -> None:
    shuffled = random.Random(0).sample(made, len(made))
    assert json.dumps(summarized(shuffled, run())) == json.dumps(document)
    other = [replace(made[0], right=not made[0].right), *made[1:]]
    assert json.dumps(summarized(other, run())) != json.dumps(document)


def test_the_document_is_strict_json(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document


def test_every_stated_key_is_there(document: dict[str, Any]) -> None:
    assert {"version", "model", "arms", "noise_floor", "comparisons", "verdict", "time"} <= document.keys()
    phase = document["arms"]["phase"]
    assert {"emulated", "kernels", "divergence", "tasks", "all"} <= phase.keys()
    stated = {"kld_mean", "kld_se", "kld_p99", "same_top1", "first_divergence_median"}
    assert stated <= phase["divergence"].keys()
    assert {"accuracy", "se", "n", "recovery", "flips", "mcnemar_p"} <= phase["tasks"]["lookup"].keys()
    assert document["arms"]["bf16"]["divergence"] is None
    assert document["arms"]["bf16"]["all"]["recovery"] == 1.0


def test_accuracy_and_flips_against_scipy(made: list[Record], document: dict[str, Any]) -> None:
    arm, reference = of(made, "uniform"), of(made, "bf16")
    score = document["arms"]["uniform"]["all"]
    right = [record.right for record in arm]
    lost = sum(b.right and not a.right for a, b in zip(arm, reference, strict=True))
    won = sum(a.right and not b.right for a, b in zip(arm, reference, strict=True))
    assert lost > won > 0
    assert score["accuracy"] == pytest.approx(np.mean(right), rel=1e-5)
    assert score["se"] == pytest.approx(sem(right), rel=1e-5)
    assert score["flips"] == {"right_to_wrong": lost, "wrong_to_right": won}
    assert score["mcnemar_p"] == pytest.approx(binomtest(won, won + lost).pvalue, rel=1e-5)
    assert score["recovery"] == pytest.approx(sum(right) / sum(r.right for r in reference), rel=1e-5)
    assert score["seeds"]["100"] == pytest.approx(np.mean([r.right for r in arm if r.seed == 100]), rel=1e-5)


def test_divergence_by_hand(made: list[Record], document: dict[str, Any]) -> None:
    arm, figures = of(made, "uniform"), document["arms"]["uniform"]["divergence"]
    klds = [record.kld or [] for record in arm]
    means = [float(np.mean(kld)) for kld in klds]
    positions = [value for kld in klds for value in kld]
    assert figures["kld_mean"] == pytest.approx(np.mean(means), rel=1e-5)
    assert figures["kld_se"] == pytest.approx(sem(means), rel=1e-5)
    assert figures["kld_p99"] == pytest.approx(np.quantile(positions, 0.99), rel=1e-5)
    low, high = figures["intervals"]["kld_p99"]
    assert low < figures["kld_p99"] < high
    assert (figures["positions"], figures["examples"]) == (len(positions), N)
    same = [1 - len(record.flips or []) / len(record.answer) for record in arm]
    assert figures["same_top1"] == pytest.approx(np.mean(same), rel=1e-5)
    assert figures["quantiles"][0][1] == pytest.approx(min(positions), rel=1e-5)
    assert figures["quantiles"][-1] == [1.0, pytest.approx(max(positions), rel=1e-5)]
    assert [q for q, _ in figures["quantiles"]] == sorted({q for q, _ in figures["quantiles"]})


def test_divergence_by_position_and_context(made: list[Record], document: dict[str, Any]) -> None:
    arm, figures = of(made, "uniform"), document["arms"]["uniform"]["divergence"]
    lengths = sorted((len(record.kld or []) for record in arm), reverse=True)
    assert 16 <= lengths[N // 4] < 32  # so the first 16 tokens, of all answers that have them
    long = [record for record in arm if len(record.kld or []) >= 16]
    assert [(row["start"], row["stop"]) for row in figures["by_position"]] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16)]
    assert {row["examples"] for row in figures["by_position"]} == {len(long)} != {N}
    row = figures["by_position"][4]
    assert row["kld_mean"] == pytest.approx(np.mean([np.mean((r.kld or [])[8:16]) for r in long]), rel=1e-5)
    rates = [sum(8 <= p < 16 for p in r.flips or []) / 8 for r in long]
    assert row["flip_rate"] == pytest.approx(np.mean(rates), rel=1e-5)
    contexts = figures["by_context"]
    assert [(c["start"], c["stop"]) for c in contexts] == [(128, 256), (256, 512), (512, 1024)]
    assert sum(c["examples"] for c in contexts) == N


def test_growth_is_of_the_same_answers() -> None:
    """Longer answers diverge more and are level: a mean over whatever reaches a position would call that growth."""
    made = [level_or_growing(record, grows=False) for record in records(200)]
    growth = summarized(made, run())["arms"]["uniform"]["divergence"]["growth"]
    assert growth["ratio"] == pytest.approx(1.0)
    made = [level_or_growing(record, grows=True) for record in records(200)]
    figures = summarized(made, run())["arms"]["uniform"]["divergence"]
    assert figures["growth"]["ratio"] > 1.3
    assert figures["growth"]["ratio_se"] < 0.02
    assert figures["growth"]["tokens"] == figures["by_position"][-1]["stop"] == 16


def level_or_growing(record: Record, grows: bool) -> Record:
    """The record with a divergence that is its answer's length, or grows up to it."""
    if record.kld is None:
        return record
    length = len(record.kld)
    return replace(record, kld=[float(length * (1 + grows * place / length)) for place in range(length)])


def test_free_run_by_hand(made: list[Record], document: dict[str, Any]) -> None:
    pairs = list(zip(of(made, "uniform"), of(made, "bf16"), strict=True))
    figures = document["arms"]["uniform"]["divergence"]
    identical = sum(a.answer == b.answer for a, b in pairs) / N
    assert 0.5 < identical < 1
    assert figures["identical"] == figures["survival"][-1][1] == pytest.approx(identical, rel=1e-5)
    assert figures["first_divergence_median"] is None  # more than half never diverge
    assert figures["survival"][0] == [0, 1.0]
    assert figures["length_ratio"] == 1.0


def test_the_median_of_first_divergences_where_most_diverge() -> None:
    damage = {"uniform": Damage(kld=1.0)}
    made = records(60, damage)
    figures = summarized(made, run(damage))["arms"]["uniform"]["divergence"]
    firsts = sorted((r.flips or [math.inf])[0] for r in of(made, "uniform"))
    assert figures["first_divergence_median"] == np.mean(firsts[29:31])


def test_rungs_hold_all_examples(document: dict[str, Any]) -> None:
    for arm in document["arms"].values():
        for task in arm["tasks"].values():
            assert [rung["rung"] for rung in task["rungs"]] == [0, 1, 2]
            assert sum(rung["n"] for rung in task["rungs"]) == task["n"]
            assert all(rung["low"] <= rung["accuracy"] <= rung["high"] for rung in task["rungs"])


def test_without_a_control_divergence_has_no_floor() -> None:
    damage = {"phase": USUAL["phase"]}
    document = summarized(records(60, damage), run(damage))
    assert document["noise_floor"] is None
    assert document["comparisons"][0]["kld_p"] is None
    assert any("no noise floor" in sentence for sentence in document["verdict"]["details"])


def test_a_server_has_free_runs_only() -> None:
    document = summarized(records(60, forced=False), run())
    figures = document["arms"]["uniform"]["divergence"]
    assert (figures["kld_mean"], figures["positions"], figures["by_position"]) == (None, 0, [])
    assert figures["identical"] < 1
    assert document["noise_floor"]["identical"] == 1.0
    assert any("cannot force" in sentence for sentence in document["verdict"]["details"])
    json.dumps(document, allow_nan=False)


def test_one_example_has_figures_without_errors() -> None:
    document = summarized(records(1), run())
    assert document["arms"]["phase"]["all"]["se"] is None
    assert document["verdict"]["outcome"] == "undecided"
    json.dumps(document, allow_nan=False)


def test_measured_layers_pass_through(made: list[Record]) -> None:
    facts = run()
    facts["arms"]["phase"]["by_layer"] = [
        {"layer": "model.layers.0", "kld_mean": 1e-6, "kld_se": 1e-7, "sqnr_db": 20.0}
    ]
    document = summarized(made, facts)
    assert document["arms"]["phase"]["divergence"]["by_layer"][0]["sqnr_db"] == 20.0
    assert "by_layer" not in document["arms"]["uniform"]["divergence"]


def test_missing_examples_are_refused(made: list[Record]) -> None:
    without = [record for record in made if record.arm != "phase" or record.index]
    with pytest.raises(InputError, match=r"Arm phase has 348 examples where bf16 has 360.*run the same command"):
        summarized(without, run())


def test_no_reference_is_refused(made: list[Record]) -> None:
    facts = run()
    del facts["arms"]["bf16"]
    with pytest.raises(InputError, match="add bf16 to the arms"):
        summarized(made, facts)


def test_logits_that_are_no_numbers_are_refused(made: list[Record]) -> None:
    broken = next(record for record in made if record.arm == "phase")
    bad = [replace(r, kld=[math.nan]) if r is broken else r for r in made]
    with pytest.raises(InputError, match=r"Arm phase has logits that are no numbers .*leave this arm out"):
        summarized(bad, run())
