"""What engines are asked in these tests, and what came of it.

A scenario is a policy, vLLM's options and a way to send the prompts. Its run holds the answers and, from the recording,
every step that led to them, so that a test can assert that what it is about did happen (a preemption, a chunk of one
row, a cached prefix) and can trace a difference to its first layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixquant.policy import TAIL
from tests.integrations.vllm import recording
from tests.integrations.vllm.engines import NEW_TOKENS, PROMPT_LENGTHS, Answer, answers, prompts, running

PHASE = {"prefill": "nvfp4", "tail": 1}
"""With the shortest tail that starts an answer precisely: many prompts are shorter than the default."""

ONE_CHUNK_UNCACHED = {"enable_prefix_caching": False, "max_num_batched_tokens": 512}


@dataclass(frozen=True)
class Scenario:
    """One engine's work: a batch of concurrent prompts, or one prompt at a time; the last of `passes` counts.

    policy: None is stock vLLM. precision: vLLM's options that every engine compared with this one shares.
    """

    # Dictionaries have no hash. Scenarios that differ in them alone are told apart by equality.
    policy: Mapping[str, Any] | None = field(default_factory=lambda: PHASE, hash=False)
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    precision: Mapping[str, Any] = field(default_factory=dict, hash=False)
    lengths: tuple[int, ...] = PROMPT_LENGTHS
    new_tokens: int = NEW_TOKENS
    seed: int = 1
    prompt_logprobs: bool = False
    alone: bool = False
    passes: int = 1

    @property
    def prompts(self) -> list[list[int]]:
        return prompts(self.lengths, self.seed)

    @property
    def tail(self) -> int:
        return int((self.policy or {}).get("tail", TAIL))

    @property
    def simplest(self) -> Scenario:
        """The same prompts, one at a time, each in one chunk, without a cache."""
        return replace(self, options=ONE_CHUNK_UNCACHED, alone=True, passes=1)

    @property
    def controls(self) -> tuple[Scenario, Scenario]:
        """The simplest way with everything quantized, and with everything plain."""
        policy = dict(self.policy or {})
        uniform = policy | {"decode": policy["prefill"]}
        return replace(self.simplest, policy=uniform), replace(self.simplest, policy=None)


@dataclass(frozen=True)
class Run:
    """The answers to a scenario's prompts, in their order, and the steps that led to them.

    runners: module of the model runner of each worker.
    """

    scenario: Scenario
    answers: list[Answer]
    steps: list[recording.Step] = field(default_factory=list)
    runners: list[str] = field(default_factory=list)

    def layer_inputs(self, length: int) -> recording.LayerInputs:
        """What each routed layer was given for the prompt of this length."""
        return recording.prompt_inputs(self.steps, length)

    @property
    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(prompt length, computed, scheduled) of every request of every step."""
        return (chunk for step in self.steps for chunk in step.requests)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return sum(answer.cached_tokens for answer in self.answers)


def run(folder: Path, scenario: Scenario) -> Run:
    """Start an engine, ask it, close it."""
    batch = scenario.prompts
    groups = [[prompt] for prompt in batch] if scenario.alone else [batch]
    with running(folder, scenario.policy, **{**scenario.precision, **scenario.options}) as llm:
        for _ in range(scenario.passes):
            result = ask(llm, scenario, groups)
    return result


def ask(llm: Any, scenario: Scenario, groups: Sequence[Sequence[Sequence[int]]], **options: Any) -> Run:
    """Send groups of concurrent prompts, one group after another, to an engine that runs."""
    prompt_logprobs = 0 if scenario.prompt_logprobs else None
    llm.collective_rpc(recording.start)
    given = [
        answer for group in groups for answer in answers(llm, group, scenario.new_tokens, prompt_logprobs, **options)
    ]
    steps = recording.merge(llm.collective_rpc(recording.stop))
    return Run(scenario, given, steps, llm.collective_rpc(recording.runner))


TOGETHER = Scenario()
"""All prompts at once: in chunks, on cached prefixes, in batches of both phases."""

CROWDED = Scenario(
    options={"num_gpu_blocks_override": 10, "max_model_len": 160},
    lengths=(19, 23, 21, 25, 20, 24, 22, 60),
    new_tokens=48,
)
"""Prompts that fit the cache together, but not with their answers: some are preempted and computed again."""

TRICKLING = replace(CROWDED, options={"max_num_batched_tokens": 8})
"""As many tokens in a step as requests: while others decode, a prompt gets one row a step."""

NGRAM = Scenario(
    options={
        "speculative_config": {
            "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1,
        }
    }
)  # fmt: skip
"""Drafts by n-gram look-up."""

TAILS = {tail: Scenario(PHASE | {"tail": tail}, prompt_logprobs=True) for tail in (0, 1, 4)}
"""By how many of the last prompt tokens are precise; with log-probabilities of the prompts."""
