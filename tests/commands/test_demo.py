"""`mixquant demo`: what the show must show, from outside."""

from __future__ import annotations

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from mixquant.checkpoint.locate import find
from mixquant.commands import demo
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.policy import Policy
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


def test_the_question_stands_before_its_answer() -> None:
    found, said = find("demo"), StringIO()
    arms = {"phase": demo.Arm("phase", load_model(found, Policy(prefill="bf16"), torch.device("cpu")))}
    answer, _ = demo._answer(arms, load_tokenizer(found), Console(file=said))
    question, answered = said.getvalue().split("Checksum of 5 records along next from 159.")
    assert "1-arithmetic.json" in question
    assert answer["text"].split()[-1] in answered
