"""`mixquant demo`: what the show must show, from outside."""

from __future__ import annotations

import json

import pytest

from tests.commandline import run


@pytest.mark.slow
def test_demo_shows_every_arm_and_no_time_of_an_emulated_one() -> None:
    document = json.loads(run("demo", "--json").stdout)
    assert document["answer"]["text"].rstrip().split("\n")[-1].startswith("answer: ")
    arms = document["arms"]
    assert {"bf16", "uniform nvfp4", "phase nvfp4"} < set(arms)
    assert arms["bf16"]["correct"] == document["examples"]
    for arm in arms.values():
        assert (arm["prefill_ms"] is None) == arm["emulated"]
    assert 0 < arms["phase nvfp4"]["kld_mean"] < arms["uniform nvfp4"]["kld_mean"]
