"""The engine against an independent reference: two ordinary Transformers models, one that reads and one that writes.

Each policy must equal its own reference, which also proves that the controls of the other tests are what they say:
everything quantized, and everything plain.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.integrations.transformers.reference import TwoModels
from tests.integrations.vllm import reference
from tests.integrations.vllm.engines import Answer, running, tiny_model
from tests.integrations.vllm.scenarios import PHASE, TAILS, TOGETHER, Scenario, ask

POLICIES = ("phase", "uniform", "plain")


@pytest.fixture(scope="module")
def models() -> TwoModels:
    return reference.two_models(tiny_model().double())


@pytest.mark.parametrize("policy", POLICIES)
def test_transformers_reference(run, check, models, policy):
    """The Transformers reference of the same policy"""
    arms = dict(zip(POLICIES, (models, *models.controls), strict=True))
    ours = run(dict(zip(POLICIES, (TOGETHER, *TOGETHER.controls), strict=True))[policy])
    expected = reference.judge(arms.pop(policy), ours)
    check(ours, expected, *(reference.judge(other, ours) for other in arms.values()))


def test_more_requests(folder, check, models):
    """The reference on many more requests: whatever differs is one flipped code"""
    with running(folder, PHASE) as llm:
        for seed in range(15, 23):
            scenario = Scenario(seed=seed, new_tokens=4)
            ours = ask(llm, scenario, [scenario.prompts])
            check(ours, *(reference.judge(arm, ours) for arm in (models, *models.controls)))


@pytest.mark.parametrize("tail", TAILS)
def test_tail_and_prompt_logprobs(run, check, models, tail):
    """The reference with a precise tail of 0, 1 or 4 tokens; the prompt's own log-probabilities too"""
    ours = run(TAILS[tail])
    uniform, plain = (reference.judge(control, ours) for control in models.controls)
    check(ours, reference.judge(models, ours), uniform, plain)


def test_cached_tail_and_answer_in_a_longer_prompt(folder, models, check):
    """An agent's second turn on the first's cache, where tail and answer keep the precision they were written in

    The reference keeps them too. The control is the same turn without the cache: all of it is prompt, so the tail and
    the answer of the first turn are quantized when they are read again.
    """
    first = Scenario(lengths=(50,))
    prompt = first.prompts[0]
    with running(folder, PHASE) as llm:
        answer = ask(llm, first, [[prompt]]).answers[0].tokens
        turn = [*prompt, *answer, *reversed(prompt)]
        second = replace(first, lengths=(len(turn),))
        cached = ask(llm, second, [[turn]])
        llm.reset_prefix_cache()
        uncached = ask(llm, second, [[turn]])
    assert len(prompt) < cached.cached_tokens < len(prompt) + len(answer)
    assert uncached.cached_tokens == 0

    cache = models.new_cache()
    models.score(torch.tensor(prompt), torch.tensor(answer), cache=cache)
    cache.crop(cached.cached_tokens)
    tokens = torch.tensor(cached.answers[0].tokens)
    scores = models.score(torch.tensor(turn), tokens, cache=cache)
    expected = Answer(scores.argmax(-1).tolist(), reference.pick(scores, tokens))
    check(cached, reference.ReferenceRun(second, [expected]), uncached)
