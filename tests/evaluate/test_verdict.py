"""Each thing a verdict can say is said where it is true, and only there."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from mixquant.evaluate.comparison import Comparison
from mixquant.evaluate.results import Results
from mixquant.evaluate.significance import examples_needed
from mixquant.evaluate.verdict import MARGIN, judge, verdict

from .synthetic import USUAL, Damage, records, run, summarized

HARMLESS = Damage(1e-5, 0.0005, 0.0005)
HARMFUL = Damage(1e-2, 0.08, 0.01)


def judged(n: int, seed: int = 0, **damage: Damage) -> dict[str, Any]:
    """The document of a run of these arms and a control."""
    arms = {"bf16-control": Damage(), **damage}
    return summarized(records(n, arms, seed), run(arms))


def row(document: dict[str, Any], arm: str, against: str = "bf16") -> dict[str, Any]:
    return next(row for row in document["comparisons"] if (row["arm"], row["against"]) == (arm, against))


def test_phase_helps() -> None:
    document = judged(2000, phase=HARMLESS, uniform=HARMFUL)
    found = document["verdict"]
    assert found["outcome"] == "phase-helps"
    assert "Quantizing the prompt (phase) costs nothing that this run can see (at most 0." in found["sentence"]
    assert "Quantizing everything (uniform) costs " in found["sentence"]
    assert found["sentence"].endswith("the difference is real.")
    assert row(document, "uniform")["kind"] == "loss"
    assert row(document, "phase", "uniform")["kind"] == "gain"


def test_uniform_is_enough() -> None:
    found = judged(1500, phase=HARMLESS, uniform=HARMLESS)["verdict"]
    assert found["outcome"] == "uniform-is-enough"
    assert "Uniform is enough here" in found["sentence"]


def test_phase_does_not_help_where_the_damage_is_the_prompts() -> None:
    """Both arms lose the same examples: uniform's loss is real, and phase gives nothing back."""
    arms = {"bf16-control": Damage(), "uniform": HARMFUL}
    made = records(2000, arms)
    made += [replace(record, arm="phase") for record in made if record.arm == "uniform"]
    found = summarized(made, run({**arms, "phase": HARMFUL}))["verdict"]
    assert found["outcome"] == "phase-does-not-help"
    assert "Phase does not help here: it is better than uniform by at most 0." in found["sentence"]


def test_phase_does_not_help_where_it_is_worse() -> None:
    found = judged(2000, phase=HARMFUL, uniform=HARMLESS)["verdict"]
    assert found["outcome"] == "phase-does-not-help"
    assert "worse than uniform by" in found["sentence"]


def test_too_few_examples_are_undecided_and_say_how_many_it_takes() -> None:
    document = judged(60, phase=HARMLESS, uniform=HARMFUL)
    found = document["verdict"]
    assert found["outcome"] == "undecided"
    needed = row(document, "phase", "uniform")["examples_needed"]
    assert f"this run has 60 examples, about {needed} are needed" in found["phase_against_uniform"]
    assert needed > 60
    assert (
        needed < row(document, "phase")["examples_needed"]
    )  # a large gain shows sooner than a small loss is ruled out
    assert judged(3 * needed, seed=1, phase=HARMLESS, uniform=HARMFUL)["verdict"]["outcome"] != "undecided"


def test_the_examples_needed_decide_between_nothing_and_the_margin_on_the_side_in_question() -> None:
    """Against BF16 a loss of the margin is in question, against uniform a gain of it."""
    found = Comparison(
        n=100, accuracy_difference=0.04, low=-0.02, high=0.1, wrong_to_right=4, right_to_wrong=0, mcnemar_p=0.125,
        mcnemar_p_holm=0.3,
    )  # fmt: skip
    against_bf16, against_uniform = (judge("phase", against, found, 0.01) for against in ("bf16", "uniform"))
    assert against_bf16.kind == against_uniform.kind == "undecided"
    assert against_bf16.examples_needed == examples_needed(4, 0, 100, 0.01)  # 5 points from -1
    assert against_uniform.examples_needed == examples_needed(0, 4, 100, 0.01)  # 4 points from 0
    assert against_bf16.examples_needed < against_uniform.examples_needed


def test_an_arm_that_is_bf16_is_within_the_noise_floor() -> None:
    document = judged(1000, phase=Damage(), uniform=HARMFUL)
    assert row(document, "phase")["kind"] == "within-noise-floor"
    assert "(phase) is within the noise floor" in document["verdict"]["sentence"]
    assert any(line.startswith("phase is ") and "within the noise" in line for line in document["verdict"]["details"])
    assert row(judged(1000, phase=Damage(kld=2e-9)), "phase")["kind"] == "no-loss"  # the control: twice the floor


def test_a_noise_floor_of_few_examples_is_not_called_one() -> None:
    assert row(judged(30, phase=Damage()), "phase")["kind"] == "undecided"


def test_a_real_loss_below_the_margin_is_named_as_both() -> None:
    damage = {"phase": Damage(1e-5, 0.006, 0.0)}
    document = summarized(records(8_000, damage), run(damage))
    assert row(document, "phase")["kind"] == "loss"
    assert "less than 1 % of BF16's right answers" in document["verdict"]["phase"]


def solved(document_of: list[Any], right: bool) -> dict[str, Any]:
    """The verdict where the reference and all arms solve everything, or nothing."""
    made = [replace(record, right=right) for record in document_of]
    return summarized(made, run())["verdict"]


def test_where_bf16_solves_nothing_nothing_is_said_to_be_enough() -> None:
    found = solved(records(600), right=False)
    assert found["outcome"] == "undecided"
    said = "BF16 solves none of 600 examples, so accuracy tells nothing: choose easier ones."
    assert found["sentence"].startswith("By divergence, phase is closer to bf16 than uniform on ")
    assert found["sentence"].endswith(said)
    assert found["sentence"].count("choose easier ones") == 1
    assert "points" not in found["sentence"], "nothing can be lost, so nothing is said of how much"


def test_where_bf16_solves_everything_the_verdict_says_that_it_may_be_too_easy() -> None:
    found = solved(records(600), right=True)
    assert found["outcome"] == "uniform-is-enough"
    assert found["sentence"].endswith("BF16 solves 100 % of these examples: harder ones may tell the arms apart.")
    assert "harder ones" not in judged(1500, phase=HARMLESS, uniform=HARMLESS)["verdict"]["sentence"]


def test_the_margin_is_a_share_of_what_bf16_solves() -> None:
    document = judged(1500, phase=HARMLESS, uniform=HARMFUL)
    accuracy = document["arms"]["bf16"]["all"]["accuracy"]
    assert 0.5 < accuracy < 0.9
    assert document["margin"] == row(document, "phase")["margin"] == pytest.approx(MARGIN * accuracy, rel=1e-5)


def test_a_handful_of_examples_tells_no_number() -> None:
    document = judged(4, phase=HARMLESS, uniform=HARMFUL)
    assert row(document, "phase")["examples_needed"] is None
    sentence = document["verdict"]["sentence"]
    assert sentence.startswith("4 examples are too few to tell accuracies apart (phase may cost up to ")
    assert sentence.count("take some hundred") == 1
    assert "with fewer than 50 examples nothing can be told" in document["verdict"]["phase"]


def test_few_examples_far_beyond_the_floor_are_too_few_and_not_noise() -> None:
    """Six examples, all of them 10,000 times further off than the control, and tests that six cannot pass."""
    few, many = (judged(n, phase=HARMLESS, uniform=HARMFUL)["verdict"]["details"] for n in (6, 60))
    assert [line for line in few if line.startswith("phase is further") and "too few examples to tell" in line]
    assert not any("within the noise" in line for line in few)
    assert not any("too few" in line for line in many)
    assert [line for line in many if line.startswith("phase is further") and line.endswith("(p < 0.0001).")]


def test_a_clear_divergence_is_in_the_headline_of_an_undecided_run() -> None:
    undecided = judged(60, phase=HARMLESS, uniform=HARMFUL)["verdict"]
    assert undecided["outcome"] == "undecided"
    assert "By divergence, phase is closer to bf16 than uniform on 100.0 % " in undecided["sentence"]
    decided = judged(2000, phase=HARMLESS, uniform=HARMFUL)["verdict"]
    assert decided["outcome"] == "phase-helps"
    assert "divergence" not in decided["sentence"]


def test_batches_of_one_example_have_no_noise_floor() -> None:
    """The control is then the reference, computed again; in larger batches the same zero is a floor."""
    arms = {"bf16-control": Damage(0.0, 0.0, 0.0), "phase": HARMLESS}
    alone = summarized(records(60, arms), run(arms) | {"batch_size": 1})
    together = summarized(records(60, arms), run(arms) | {"batch_size": 2})
    assert alone["arms"]["bf16-control"]["divergence"]["kld_max"] == 0.0
    assert (alone["noise_floor"], row(alone, "phase")["kld_p"]) == (None, None)
    assert "batches of one example have no other composition" in " ".join(alone["verdict"]["details"])
    assert together["noise_floor"]["kld_mean"] == 0.0
    assert row(together, "phase")["kld_p"] < 1e-9


def test_a_gain_is_called_a_gain() -> None:
    assert "gains" in judged(2000, phase=Damage(1e-5, 0.0, 0.3))["verdict"]["phase"]


def test_a_control_that_errs_in_one_direction_is_mistrusted() -> None:
    arms = {"bf16-control": Damage(lost=0.1, won=0.0), "phase": HARMLESS}
    details = summarized(records(1000, arms), run(arms))["verdict"]["details"]
    assert any("mistrust this engine's batching" in sentence for sentence in details)
    assert not any("mistrust" in sentence for sentence in judged(1000, phase=HARMLESS)["verdict"]["details"])


@pytest.mark.parametrize("missing", ["phase", "uniform"])
def test_a_missing_arm_leaves_its_sentence_out(missing: str) -> None:
    arms = {arm: damage for arm, damage in USUAL.items() if arm != missing}
    found = summarized(records(120, arms), run(arms))["verdict"]
    assert found[missing] is found["phase_against_uniform"] is found["outcome"] is None
    assert found["sentence"]


def test_without_quantized_arms_the_remedy_is_named() -> None:
    arms = {"bf16-control": Damage()}
    assert "add phase and uniform" in summarized(records(60, arms), run(arms))["verdict"]["sentence"]


def test_a_written_file_can_be_judged_again() -> None:
    document = judged(500, phase=HARMLESS, uniform=HARMFUL)
    read = Results.model_validate_json(json.dumps(document))
    assert verdict(read.arms, read.comparisons, read.along) == read.verdict
