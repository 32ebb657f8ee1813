"""Forwards of changing lengths run without cuDNN's attention; all other kernels stay as they were, then and after."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.backends import cuda
from transformers import PreTrainedModel

import mixquant
from mixquant.checkpoint.locate import find
from mixquant.evaluate.engine import Query
from mixquant.integrations.transformers.attention import without_cudnn_attention
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.generation import generate
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.integrations.transformers.sensitivity import decoder_layers, measure
from tests.conftest import PHASE, tiny_qwen3

IDS = torch.tensor([[5, 9, 3, 7, 5, 9, 3, 7]])
QUERIES = [Query("", [5, 9, 3, 7, 7], 4), Query("", [8, 1, 4], 4)]
ANSWERS = [[6, 2, 9], [3, 10]]

tokenizer = functools.cache(lambda: load_tokenizer(find("demo")))

Run = Callable[[PreTrainedModel], object]
RUNS: dict[str, Run] = {
    "score": lambda model: TransformersBackend(model).open("phase").score(QUERIES, ANSWERS),
    "another kernel": lambda model: TransformersBackend(model).open("phase-control").score(QUERIES, ANSWERS),
    "write": lambda model: TransformersBackend(model).open("phase").generate(QUERIES),
    "layers": lambda model: measure(model, decoder_layers(model), QUERIES, ANSWERS),
    "mixquant generate": lambda model: generate(model, tokenizer(), IDS, 4),
}

Switches = tuple[bool, bool, bool, bool]
STATES: dict[str, Switches] = {
    "all on": (True, True, True, True),
    "cuDNN off": (False, True, True, True),
    "flash off": (True, False, True, True),
    "one left": (True, False, False, True),
}
"""cuDNN, flash, memory-efficient, math."""


def switches() -> Switches:
    return cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()


def switch(state: Switches) -> None:
    turns = cuda.enable_cudnn_sdp, cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_math_sdp
    for turn, enabled in zip(turns, state, strict=True):
        turn(enabled)


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> Iterator[Switches]:
    """What torch's switches say before."""
    before = switches()
    switch(STATES[request.param])
    yield STATES[request.param]
    switch(before)


@pytest.fixture(scope="module")
def loaded() -> PreTrainedModel:
    return mixquant.convert_(tiny_qwen3(vocab_size=len(tokenizer())), PHASE)  # type: ignore[return-value]


@pytest.fixture
def model(loaded: PreTrainedModel) -> PreTrainedModel:
    """Of its own for each test, which hangs hooks on it."""
    return copy.deepcopy(loaded)


def watched(model: PreTrainedModel) -> list[Switches]:
    """What the switches say in each layer's attention from now on."""
    seen: list[Switches] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(switches()))
    return seen


@pytest.mark.parametrize("run", RUNS)
def test_cudnn_is_off_in_every_forward_and_nothing_else_changes(
    run: str, state: Switches, model: PreTrainedModel
) -> None:
    seen = watched(model)
    RUNS[run](model)
    assert set(seen) == {(False, *state[1:])}
    assert switches() == state


@pytest.mark.parametrize("run", RUNS)
def test_a_forward_that_fails_puts_back_what_was(run: str, model: PreTrainedModel) -> None:
    before = switches()

    def fail(*_: object) -> None:
        raise ValueError("broken")

    model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        RUNS[run](model)
    assert switches() == before
    assert before[0], "it was on"


@torch.inference_mode()
def test_control_users_own_forwards_are_stock(state: Switches, model: PreTrainedModel) -> None:
    seen = watched(model)
    model(IDS)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert set(seen) == {state}


def test_it_nests(state: Switches) -> None:
    with without_cudnn_attention():
        with without_cudnn_attention():
            assert switches() == (False, *state[1:])
        assert switches() == (False, *state[1:])
    assert switches() == state
