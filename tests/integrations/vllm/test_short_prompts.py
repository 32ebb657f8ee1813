"""`min_prompt`: requests with few prompt tokens to read are read precisely, for their whole life, whatever runs beside.

A short prompt gets stock vLLM's answer, any other the phase engine's without `min_prompt`, each alone and uncached.
Controls: the phase engine, which quantizes short prompts too, and stock vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability

from mixquant.integrations.vllm import short_prompts
from mixquant.integrations.vllm.short_prompts import MEASURED, MEASURED_NESTED, ShortPrompts, min_prompt
from mixquant.kernels.nested_cuda import NestedCUDA
from mixquant.phase import WHOLE_PROMPT
from mixquant.policy import Policy
from tests.integrations.vllm import engines
from tests.integrations.vllm.engines import CONTROL, greatest_difference
from tests.integrations.vllm.scenarios import CROWDED, NGRAM, PHASE, TOGETHER, TRICKLING, Run, Scenario

FEWEST = 24
SHORT = PHASE | {"min_prompt": FEWEST}
UNCACHED = {"enable_prefix_caching": False}

Check = Callable[..., Run]


@pytest.fixture
def check_short(run: Callable[[Scenario], Run], check: Callable[..., None]) -> Check:
    """Assert that short prompts of a scenario get stock vLLM's answers and the others the phase engine's."""

    def check_short(scenario: Scenario) -> Run:
        plain, phase = (run(replace(scenario.simplest, policy=policy)) for policy in (None, PHASE))
        short = [length < FEWEST for length in scenario.lengths]
        right = [p if is_short else q for is_short, p, q in zip(short, plain.answers, phase.answers, strict=True)]
        ours = run(scenario)
        check(ours, replace(phase, answers=right), phase, plain)
        assert any(short)
        assert not all(short)
        for length, answer, wrong in zip(scenario.lengths, ours.answers, phase.answers, strict=True):
            if 1 < length < FEWEST:  # a prompt of one token is tail anyway
                assert greatest_difference(answer, wrong) > CONTROL
        return ours

    return check_short


def test_short_prompts_beside_others(check_short: Check) -> None:
    """Prompts of fewer than 24 tokens, read as stock vLLM does, beside longer ones in chunks"""
    ours = check_short(replace(TOGETHER, policy=SHORT, options=UNCACHED))
    assert any(min(step.lengths) < FEWEST <= max(step.lengths) for step in ours.steps)


def test_preempted_short_prompts(check_short: Check) -> None:
    """The same where requests are preempted: then prompt and answer are more tokens than few"""
    ours = check_short(replace(CROWDED, policy=SHORT))
    again = [each for each in ours.chunks if each[0] < FEWEST and each[1] < each[0] < each[1] + each[2]]
    assert any(scheduled >= FEWEST for _, _, scheduled in again)


def test_short_prompts_in_chunks(check_short: Check) -> None:
    """The same in chunks of few rows, of which a longer prompt's last is shorter than a short prompt"""
    ours = check_short(replace(TRICKLING, policy=SHORT))
    assert any(length < FEWEST and 0 < computed < length for length, computed, _ in ours.chunks)
    assert any(length >= FEWEST and length - FEWEST < computed < length for length, computed, _ in ours.chunks)


@pytest.mark.slow
def test_short_prompts_with_drafts(check_short: Check) -> None:
    """The same with drafts by n-gram look-up"""
    check_short(replace(NGRAM, policy=SHORT, options=NGRAM.options | UNCACHED))


CACHED = 192
"""Tokens of the prefix that the cache holds: six blocks."""


def ask(folder: Path, policy: dict[str, Any], *groups: Sequence[list[int]], **options: Any) -> list[list[Any]]:
    """The answers to groups of concurrent prompts, one group after another."""
    with engines.running(folder, policy, **options) as llm:
        return [engines.answers(llm, group) for group in groups]


def test_a_short_turn_on_a_long_cached_prefix(folder: Path) -> None:
    """Few new tokens count, however long the prompt is: as if they were its tail. One more than few is quantized."""
    prefix, few, many = engines.prompts((CACHED + 1, FEWEST - 1, FEWEST + 8), seed=7)
    turns = [prefix[:CACHED] + new for new in (few, many)] + [few]
    first, ours = ask(folder, SHORT, [prefix], turns, max_num_batched_tokens=512)
    assert [answer.cached_tokens for answer in ours] == [CACHED, CACHED, 0]
    alone = {"max_num_batched_tokens": 512, **UNCACHED}
    ((tail,),) = ask(folder, PHASE | {"tail": len(few)}, turns[:1], **alone)
    quantized = [answer for (answer,) in ask(folder, PHASE, *([turn] for turn in (prefix, *turns)), **alone)]
    plain = [answer for (answer,) in ask(folder, None, *([turn] for turn in turns), **alone)]
    expected = [quantized[0], tail, quantized[2], plain[2]]
    for answer, right in zip([*first, *ours], expected, strict=True):
        assert answer.tokens == right.tokens
        assert greatest_difference(answer, right) < engines.EXACT
    for answer, wrong in ((ours[0], quantized[1]), (ours[0], plain[0]), (ours[1], plain[1]), (ours[2], quantized[3])):
        assert greatest_difference(answer, wrong) > CONTROL


def scheduled(*new: SimpleNamespace, finished: Sequence[str] = ()) -> SimpleNamespace:
    return SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=set(finished))


def request(name: str, length: int, computed: int = 0, embedded: bool = False) -> SimpleNamespace:
    """As V2 sends it, `prefill_token_ids` holds an answer too; V1 sends none."""
    return SimpleNamespace(
        req_id=name, prompt_token_ids=None if embedded else [3] * length, num_computed_tokens=computed,
        prompt_embeds=torch.zeros(length, 8) if embedded else None, prefill_token_ids=[3] * (length + 50),
    )  # fmt: skip


def test_a_request_keeps_its_first_answer_until_it_is_finished() -> None:
    short = ShortPrompts(10)
    names = ["few", "many", "cached", "embedded", "unknown"]
    short.follow(
        scheduled(
            request("few", 9), request("many", 10), request("cached", 109, 100), request("embedded", 9, embedded=True)
        )
    )
    expected = [WHOLE_PROMPT, 4, WHOLE_PROMPT, WHOLE_PROMPT, 4]
    assert short.tails(names, 4) == expected
    short.follow(scheduled(request("cached", 109), request("many", 10, 5)))  # preempted; V2's runner gets them as new
    assert short.tails(names, 4) == expected
    short.follow(scheduled(request("few", 99), finished=["few", "many"]))  # another request of the same name
    assert short.tails(names, 4) == [4, 4, WHOLE_PROMPT, WHOLE_PROMPT, 4]
    short.follow(scheduled(finished=["few", "cached", "embedded", "unknown"]))
    assert not short._precise


def test_zero_switches_it_off() -> None:
    short = ShortPrompts(0)
    short.follow(scheduled(request("one", 1)))
    assert short.tails(["one"], 1) == [1]
    assert not short._precise


ADA, HOPPER, AMPERE, BLACKWELL = (8, 9), (9, 0), (8, 0), (10, 0)

DEFAULTS = [
    ({}, HOPPER, MEASURED_NESTED),
    ({"prefill": "fp8"}, HOPPER, MEASURED_NESTED),
    ({"prefill": "fp8", "storage": "separate"}, HOPPER, MEASURED),
    ({"prefill": "fp8", "storage": "nested"}, ADA, MEASURED_NESTED),
    ({"prefill": "fp8", "min_prompt": 0}, HOPPER, 0),
    ({"prefill": "fp8", "min_prompt": 9}, HOPPER, 9),
    ({"prefill": "fp8"}, ADA, MEASURED),
    ({"prefill": "fp8"}, BLACKWELL, MEASURED),
    ({}, BLACKWELL, 0),  # NVFP4
    ({"prefill": "nvfp4"}, HOPPER, 0),
    ({"prefill": "int8"}, HOPPER, 0),
    ({"prefill": "fp8"}, AMPERE, 0),  # emulated
    ({"prefill": "fp8", "decode": "fp8"}, HOPPER, 0),
    ({"prefill": "fp8", "decode": "fp8", "min_prompt": 9}, HOPPER, 0),
    ({"prefill": "bf16", "decode": "fp8"}, HOPPER, 0),
    ({"prefill": "fp8", "role": "prefill"}, HOPPER, 0),
    ({"prefill": "fp8"}, None, 0),  # a CPU
    ({"prefill": "fp8", "min_prompt": 9}, None, 9),
]


@pytest.mark.parametrize(("policy", "capability", "expected"), DEFAULTS)
def test_the_number_in_force(
    policy: dict[str, Any], capability: tuple[int, int] | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = None if capability is None else DeviceCapability(*capability)
    platform = SimpleNamespace(is_cuda=lambda: found is not None, get_device_capability=lambda: found)
    monkeypatch.setattr(short_prompts, "current_platform", platform)
    assert min_prompt(Policy.parse(policy).held) == expected


@pytest.mark.parametrize("capability", [ADA, HOPPER, AMPERE, BLACKWELL])
def test_it_knows_where_weights_nest(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(*capability))
    monkeypatch.setattr(short_prompts, "current_platform", platform)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert short_prompts._nests("auto") is NestedCUDA.default_on(torch.device("cuda"))
