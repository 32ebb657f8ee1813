"""Requests whose prompts are read precisely, since they are too short to gain by a second weight.

Which these are, `phase.reads_precisely` says; when it is asked, and how long the answer holds, stands here. It is asked
in the step that first schedules a request. What the prefix cache holds then, or what another server or a store has
sent, is computed. The answer holds until the request is finished. A preempted request comes to V2's runner as a new
one, with less in the cache than at first or with more: it keeps its answer, and so does one whose KV failed to load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.platforms import current_platform

from mixquant.phase import WHOLE_PROMPT, reads_precisely
from mixquant.policy import Policy

MEASURED = 512
"""The least number of new tokens that phase has been seen to read within 5 % of BF16's time: on an H200 (vLLM 0.26,
Qwen3-8B's shape) those on 16,384 cached ones took, in ms,

    new tokens    by phase, FP8    BF16    vLLM's uniform FP8
    128           24.9             19.7    21.1
    256           28.0             22.7    23.1    (of an earlier run)
    512           34.2             33.3    30.5
    1,024         48.5             52.0    44.1

with two copies of the weights and a tail of 1. With a tail of 32, on a busy host, 512 took 1.11 times BF16's time (1.01
to 1.16 from turn to turn) and 1,024 took 0.98 (benchmarks/results/bench-8b-h200.md, arm `copies`)."""

MEASURED_NESTED = 256
"""The greatest number, of those that graphs of precise rows hold, up to which precise rows were faster than quantized
ones where weights nest: on 16,384 cached tokens 26.9 ms against 29.7 for 256 new ones, 38.2 against 36.7 for 384
(benchmarks/results/bench-8b-h200.md, arms `none` and `all`)."""

FP8_CAPABILITY = (8, 9)
NVFP4_CAPABILITY = (10, 0)
"""From these on a GPU multiplies FP8, and NVFP4, which `auto` then takes."""

NESTING_CAPABILITY = (9, 0)
"""Where weights nest by default (`NestedCUDA.default_on`)."""


def min_prompt(policy: Policy) -> int:
    """The `min_prompt` that is in force here under what an engine holds (`Policy.held`)."""
    if policy.prefill == policy.decode:
        return 0  # one product: no prompt is read otherwise than the others
    if policy.min_prompt is not None:
        return policy.min_prompt
    if policy.decode != "bf16" or not _reads_fp8(policy.prefill):
        return 0
    return MEASURED_NESTED if _nests(policy.storage) else MEASURED


def _capability() -> Any:
    """That of a CUDA device, and None elsewhere; asked of the driver, since front processes start no CUDA."""
    return current_platform.get_device_capability() if current_platform.is_cuda() else None


def _reads_fp8(format: str) -> bool:
    """Whether prompts run in native FP8 on CUDA; nothing else was measured."""
    found = _capability()
    if found is None or format not in ("auto", "fp8"):
        return False
    return bool(found >= FP8_CAPABILITY and (format == "fp8" or found < NVFP4_CAPABILITY))


def _nests(storage: str) -> bool:
    """Whether BF16 weights that FP8 is made of are nested."""
    return storage == "nested" or (storage == "auto" and bool(_capability() == NESTING_CAPABILITY))


@dataclass(eq=False)
class ShortPrompts:
    """The requests of an engine that are not finished, and whether each is read precisely."""

    min_prompt: int = 0
    _precise: dict[str, bool] = field(default_factory=dict)  # by the request's id

    def follow(self, scheduled: Any) -> None:
        """Before a step: what the scheduler (its `SchedulerOutput`) says of requests that came and went."""
        if not self.min_prompt:
            return
        for request in scheduled.finished_req_ids:  # first: its id may come again in this very step
            self._precise.pop(request, None)
        for new in scheduled.scheduled_new_reqs:
            precise = reads_precisely(prompt_length(new), new.num_computed_tokens, self.min_prompt)
            self._precise.setdefault(new.req_id, precise)

    def tails(self, requests: Sequence[str], tail: int) -> list[int]:
        """How many of the last prompt tokens of each request are precise, where `tail` are of others."""
        return [WHOLE_PROMPT if self._precise.get(request) else tail for request in requests]


def prompt_length(new: Any) -> int:
    """Tokens in the prompt of a `NewRequestData`: ids or embeddings, and never an answer that is computed again."""
    return len(new.prompt_embeds if new.prompt_token_ids is None else new.prompt_token_ids)
