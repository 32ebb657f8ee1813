"""A prefill server's engine: it holds the quantized weights alone, and every row goes through them."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch

from mixquant.integrations.vllm.kernels import CutlassFP8, VllmNVFP4
from mixquant.kernels.base import Accepted
from mixquant.kernels.cpu import Int8OneDNN
from tests.integrations.vllm.engines import CONTROL, answers, greatest_difference, linear_weights, prompts, running
from tests.integrations.vllm.test_metrics import logged

ROLE = {"prefill": "nvfp4", "role": "prefill"}


def test_every_row_is_quantized_and_no_plain_weight_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = linear_weights(monkeypatch)
    with running(folder, ROLE) as llm:
        gc.collect()
        assert [weight() for weight in weights] == [None] * 12
        ours = answers(llm, prompts())
    with running(folder, {"prefill": "nvfp4", "decode": "nvfp4"}) as llm:
        assert answers(llm, prompts()) == ours
    with running(folder, {"prefill": "nvfp4", "tail": 1}) as llm:
        control = answers(llm, prompts())
    assert max(map(greatest_difference, ours, control)) > CONTROL


def test_what_a_prefill_server_holds_of_its_linear_layers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured for INT8, which this CPU multiplies; for FP8 and NVFP4 what their kernels lay out on a GPU."""
    if Int8OneDNN.check(torch.device("cpu"), torch.bfloat16) != Accepted():
        pytest.skip("no native INT8 here")
    log = logged(monkeypatch)
    with running(folder, {"prefill": "int8", "role": "prefill"}, dtype="bfloat16"):
        pass
    (bits,) = re.findall(r"\((\S+) bits a weight\)", "\n".join(log))
    assert float(bits) <= 0.55 * 16
    plain = 2 * 4096 * 4096
    assert CutlassFP8.nbytes(4096, 4096, torch.bfloat16) <= 0.55 * plain
    assert VllmNVFP4.nbytes(4096, 4096, torch.bfloat16) <= 0.35 * plain
