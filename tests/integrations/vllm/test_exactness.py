"""What an engine does to be fast must not change an answer: the V1 runner in one process.

Each test compares one way of serving some prompts with the simplest one: one prompt at a time, in one chunk, without a
cache. Controls: everything quantized, and stock vLLM.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.integrations.vllm import recording
from tests.integrations.vllm.engines import tiny_model
from tests.integrations.vllm.scenarios import CROWDED, NGRAM, TOGETHER, TRICKLING, Run, Scenario


def test_concurrent_chunked_and_cached(check_scenario):
    """Concurrent requests in chunks that share cached prefixes"""
    ours = check_scenario(TOGETHER)
    assert ours.runners == [recording.V1]
    assert any(len(step.lengths) > 1 for step in ours.steps)
    assert any(0 < computed < length for length, computed, _ in ours.chunks)
    assert ours.cached_tokens > 0


def test_second_pass_on_a_warm_cache(run, check_scenario):
    """The same requests again, on a warm prefix cache"""
    ours = check_scenario(replace(TOGETHER, passes=2))
    assert ours.cached_tokens > run(TOGETHER).cached_tokens


def test_prompt_chunks_of_one_row(check_scenario):
    """Prompt chunks of one row in batches that otherwise decode"""
    ours = check_scenario(TRICKLING)
    assert any(scheduled == 1 and 0 < computed < length - 1 for length, computed, scheduled in ours.chunks)


def test_preemption(check_scenario):
    """Preempted requests computed again, in chunks that hold prompt and answer"""
    ours = check_scenario(CROWDED)
    assert any(computed < length < computed + scheduled for length, computed, scheduled in ours.chunks)


@pytest.mark.slow
def test_ngram_speculation(check_scenario):
    """Drafts by n-gram look-up"""
    assert verifies_drafts(check_scenario(NGRAM))


def test_draft_model_speculation(check_scenario, tmp_path: Path):
    """Drafts by a smaller model"""
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    drafting = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3}
    assert verifies_drafts(check_scenario(Scenario(options={"speculative_config": drafting})))


def verifies_drafts(ours: Run) -> bool:
    return any(computed >= length and scheduled > 1 for length, computed, scheduled in ours.chunks)


@pytest.mark.slow
def test_torch_compile(check_scenario):
    """The model under torch.compile"""
    check_scenario(Scenario(options={"enforce_eager": False}))
