"""Where vLLM takes up a request again, or has it in another form: no token changes its phase.

Each is a path in vLLM 0.32's sources along which an answer could run as a prompt, or a prompt as an answer. Where an
answer's tokens are drawn, the control is the fault itself: the reference reads prompt and answer as one prompt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixquant.errors import InputError
from tests.integrations.transformers.reference import TwoModels
from tests.integrations.vllm import failing, recording, reference, store
from tests.integrations.vllm.engines import (
    Answer,
    as_answer,
    engine_defaults,
    hf_overrides,
    running,
    sampling,
    tiny_model,
)  # fmt: skip
from tests.integrations.vllm.scenarios import CROWDED, PHASE, TOGETHER, Run, Scenario, ask


@pytest.fixture(scope="module")
def models() -> TwoModels:
    return reference.two_models(tiny_model().double())


def recorded(llm: Any, scenario: Scenario, requests: list[Any]) -> Run:
    """The greedy answers to requests in another form than token ids."""
    llm.collective_rpc(recording.start)
    outputs = llm.generate(requests, sampling(), use_tqdm=False)
    steps = recording.merge(llm.collective_rpc(recording.stop))
    return Run(scenario, [as_answer(output) for output in outputs], steps, llm.collective_rpc(recording.runner))


def test_prompts_as_embeddings(folder, run, check):
    """Prompts given as embeddings: the same as token ids"""
    table = tiny_model().get_input_embeddings().weight.detach()
    requests = [{"prompt_embeds": table[torch.tensor(tokens)]} for tokens in TOGETHER.prompts]
    with running(folder, PHASE, enable_prompt_embeds=True) as llm:
        ours = recorded(llm, TOGETHER, requests)
    check(ours, run(TOGETHER.simplest), *map(run, TOGETHER.controls))


def test_several_samples_of_a_prompt(folder, check, models):
    """Three samples of each prompt: the reference's log-probabilities; control: prompt and answer as one prompt"""
    params = sampling()
    params.n, params.temperature = 3, 1.0
    requests = [{"prompt_token_ids": tokens} for tokens in TOGETHER.prompts]
    with running(folder, PHASE) as llm:
        outputs = llm.generate(requests, params, use_tqdm=False)
    for place in range(3):
        drawn = [as_answer(output, place) for output in outputs]
        assert place == 0 or drawn != [as_answer(output, 0) for output in outputs]
        ours = Run(TOGETHER, drawn, [], [])
        check(ours, judged(models, ours), reread(models, ours))


def judged(models: TwoModels, ours: Run) -> Run:
    """The reference's log-probabilities of drawn tokens."""
    scored = [
        Answer(answer.tokens, given.logprobs)
        for answer, given in zip(ours.answers, reference.judge(models, ours).answers, strict=True)
    ]
    return replace(ours, answers=scored)


def reread(models: TwoModels, ours: Run) -> Run:
    """The same where each answer has come back as a part of its prompt."""
    found = []
    for prompt, answer in zip(ours.scenario.prompts, ours.answers, strict=True):
        scores = reference.prompt_scores(models, torch.tensor([*prompt, *answer.tokens]), tail=1)
        found.append(Answer(answer.tokens, scores[-len(answer.tokens) :]))
    return replace(ours, answers=found)


@pytest.fixture
def _empty_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    store.BLOCKS.clear()
    yield
    store.BLOCKS.clear()


@pytest.mark.usefixtures("_empty_store")
def test_loads_that_fail(folder, run, check):
    """KV that a store fails to load is computed again, of prompts and of preempted answers"""
    options = dict(CROWDED.options) | {"enable_prefix_caching": False, "kv_transfer_config": failing.CONFIG}
    crowded = replace(CROWDED, options=options)
    with running(folder, PHASE, **options) as llm:
        ask(llm, crowded, [crowded.prompts])  # fills the store
        lost = len(failing.LOST)
        ours = ask(llm, crowded, [crowded.prompts])
    assert len(failing.LOST) > lost
    assert any(computed < length < computed + scheduled for length, computed, scheduled in ours.chunks)
    check(ours, run(CROWDED.simplest), *map(run, CROWDED.controls))


def test_a_prompt_that_comes_in_pieces_is_refused(folder):
    """A session's answers would become a part of its prompt; a whole prompt is answered by the same engine."""
    whole, sentence = asyncio.run(stream(str(folder)))
    assert len(whole) == 3
    assert "streaming input hands answers back as prompts" in sentence
    assert "send each prompt as a request of its own" in sentence


async def stream(folder: str) -> tuple[list[int], str]:
    """(answer to a whole prompt, what is said to one in pieces) of vLLM's asynchronous front."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.v1.engine.async_llm import AsyncLLM

    async def pieces() -> AsyncIterator[StreamingInput]:
        yield StreamingInput({"prompt_token_ids": [1, 2, 3]})

    options = engine_defaults() | {"hf_overrides": hf_overrides(PHASE)}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=folder, **options))
    try:
        async for output in llm.generate({"prompt_token_ids": [1, 2, 3]}, sampling(3), "whole"):
            found = list(output.outputs[0].token_ids)
        with pytest.raises(InputError) as refused:
            llm.generate(pieces(), sampling(3), "pieces")
        return found, str(refused.value)
    finally:
        llm.shutdown()
