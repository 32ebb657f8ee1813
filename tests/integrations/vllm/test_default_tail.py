"""The tail that nobody gives, in vLLM: 32 tokens, and 1 in a pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixquant.integrations.vllm import runner
from mixquant.phase import Phase, Plan, Run, plan
from mixquant.policy import TAIL
from tests.integrations.vllm import reference
from tests.integrations.vllm.engines import engine_config, tiny_model
from tests.integrations.vllm.scenarios import ONE_CHUNK_UNCACHED, PHASE, Scenario
from tests.integrations.vllm.scenarios import Run as Ran

DEFAULT = {"prefill": "nvfp4"}
LONG = Scenario(DEFAULT, lengths=(100,))
SHORT = Scenario(DEFAULT, lengths=(1, 17, TAIL))


@pytest.mark.parametrize(
    ("policy", "asked", "engines"),
    [(DEFAULT, TAIL, TAIL), (PHASE, 1, 1), (DEFAULT | {"role": "prefill"}, 1, 0)],  # such a server has one product
    ids=["default", "tail=1", "a pair's"],
)
def test_the_tail_of_an_engine(folder: Path, policy: dict[str, Any], asked: int, engines: int) -> None:
    method = engine_config(folder, policy).quant_config
    assert (method.policy.tail, method.state.tail) == (asked, engines)


def test_the_last_32_tokens_of_a_prompt_are_precise(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    def watched(*numbers: Any) -> Plan:
        plans.append(plan(*numbers))
        return plans[-1]

    monkeypatch.setattr(runner, "plan", watched)
    from tests.integrations.vllm.scenarios import run

    run(folder, Scenario(DEFAULT, ONE_CHUNK_UNCACHED, lengths=(100,), new_tokens=2))
    read, written = [made.runs for made in plans]
    assert read == (Run(0, 68, Phase.PREFILL), Run(68, 100, Phase.DECODE))
    assert written == (Run(0, 1, Phase.DECODE),)


def test_answers_are_those_of_two_models_that_hand_over_there(
    run: Callable[[Scenario], Ran], check: Callable[..., None]
) -> None:
    models = reference.two_models(tiny_model().double())
    ours = run(LONG)
    check(ours, *(reference.judge(arm, ours) for arm in (models, *models.controls)))


def test_a_prompt_no_longer_than_the_tail_is_read_as_without_us(run: Callable[[Scenario], Ran]) -> None:
    """By stock vLLM, to the last bit."""
    ours, stock = run(SHORT), run(Scenario(None, lengths=SHORT.lengths))
    assert ours.answers == stock.answers
    assert run(Scenario(PHASE, lengths=SHORT.lengths)).answers != stock.answers
