"""One arm of blackwell.py in a process of its own: an engine starts, is measured, and ends with its process.

    python -m benchmarks.blackwell_arm MODEL FILE [--prefill nvfp4|fp8] [--quantization fp8]

MODEL is served by vLLM with its own defaults but for the longest context: stock, by mixquant (`--prefill`), or by
vLLM's own `--quantization`. FILE gets the document. Prompts are random tokens. Times are wall times of `LLM.generate`,
so they hold the scheduler and the sampler. Where a kernel is emulated there are no times: they would say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # `facts_of` goes to the worker

import torch

from mixquant.integrations.vllm.bench import facts

ROUNDS = 5
DECODED = 64
PROMPTS = (512, 2048, 8192)
BATCHES = (1, 8)
BEHIND = 256
"""Prompt tokens behind which a decode step is timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--prefill")
    parser.add_argument("--quantization")
    args = parser.parse_args()
    args.file.write_text(json.dumps(measure(args.model, args.prefill, args.quantization)))


def measure(model: str, prefill: str | None, quantization: str | None) -> dict[str, Any]:
    llm, prompts, fresh = start(model, prefill, quantization)
    found = llm.collective_rpc(facts_of)[0]
    document = {key: found[key] for key in ("kernels", "emulated")} | {
        "weights_bytes": found["model_bytes"],
        "ms": None,
    }
    if found["emulated"]:
        seconds(llm, fresh(1, prompts[0]), 8)  # it runs, and that is all there is to say
        return document
    rows = {f"first token, {n} tokens": samples(lambda n=n: seconds(llm, fresh(1, n), 1)) for n in prompts}
    for batch in BATCHES:
        behind = fresh(batch, BEHIND)
        rows[f"decode step, batch {batch}"] = samples(lambda behind=behind: decode_step(llm, behind))
    return document | {"ms": rows}


def start(
    model: str, prefill: str | None, quantization: str | None
) -> tuple[Any, list[int], Callable[[int, int], list[list[int]]]]:
    """An engine, the lengths of the prompts that its model takes, and what makes so many prompts of a length."""
    from transformers import AutoConfig
    from vllm import LLM

    from mixquant.integrations.vllm import register

    register()  # where mixquant runs from a checkout, no entry point does it
    on_cpu = not torch.cuda.is_available()
    config = AutoConfig.from_pretrained(model).get_text_config()
    window, generator = config.max_position_embeddings, torch.Generator().manual_seed(0)
    prompts = [n for n in (PROMPTS[:1] if on_cpu else PROMPTS) if n + DECODED < window] or [window // 2]
    policy = {"quantization_config": {"quant_method": "mixquant", "prefill": prefill}} if prefill else {}
    llm = LLM(
        model, hf_overrides=policy, quantization=quantization, skip_tokenizer_init=True, enable_prefix_caching=True,
        max_model_len=min(window, max(prompts[-1], BEHIND) + 2 * DECODED), seed=0,
        **({"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30} if on_cpu else {}),
    )  # fmt: skip
    return llm, prompts, lambda n, length: torch.randint(config.vocab_size, (n, length), generator=generator).tolist()


def samples(work: Callable[[], float]) -> list[float]:
    """Milliseconds of each round; the first warms up and does not count."""
    return [1e3 * work() for _ in range(1 + ROUNDS)][1:]


def seconds(llm: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Wall time of a batch of concurrent requests."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    llm.generate(requests, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def decode_step(llm: Any, prompts: list[list[int]]) -> float:
    """Seconds of one decode step behind cached prompts."""
    seconds(llm, prompts, 1)
    return (seconds(llm, prompts, 1 + DECODED) - seconds(llm, prompts, 1)) / DECODED


def facts_of(worker: Any) -> dict[str, Any]:
    """Which kernels multiply in each phase, whether one is emulated, and what the weights take."""
    return facts(worker.model_runner)


if __name__ == "__main__":
    main()
