"""Routed experts on a CUDA GPU: a tiny Qwen3-MoE with an FP8 prefill, with CUDA graphs and without.

    python benchmarks/vllm_moe.py

Concurrent requests in chunks and graphs against one request at a time, eager. BF16's own difference between the two
is the noise floor; stock BF16 is the control, which must differ by far more. Each engine runs in a process of its own,
which says where it stands if it takes longer than two minutes, and ends.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

Answers = list[tuple[list[int], list[float]]]
LENGTHS = (40, 83, 131, 205, 301, 420, 555, 700, 1000)
LONGEST_S = 120
"""Seconds that an engine may take, its start included."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        runs = [(folder, prefill, together) for prefill in ("fp8", None) for together in (True, False)]
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
            ours, alone, stock, stock_alone = pool.map(answers, *zip(*runs, strict=True))
    print(f"tiny Qwen3-MoE, BF16 with FP8 prefill, {torch.cuda.get_device_name()}")
    print("phase: concurrent with graphs against alone and eager:", compare(ours, alone))
    print("stock BF16: the same (noise floor)                   :", compare(stock, stock_alone))
    print("control: phase against stock BF16                    :", compare(ours, stock))


def write_model(folder: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=512, moe_intermediate_size=256, intermediate_size=512, num_experts=16,
        num_experts_per_tok=4, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=4096, norm_topk_prob=True,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.06)
    model.bfloat16().save_pretrained(folder)


def answers(folder: str, prefill: str | None, together: bool) -> Answers:
    """24 greedy tokens for each prompt, and their log-probabilities."""
    faulthandler.dump_traceback_later(LONGEST_S, exit=True)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the engine is a process of vLLM's, which says nothing
    from vllm import LLM, SamplingParams

    from mixquant.integrations.vllm import register

    register()  # where mixquant runs from a checkout, no entry point does it
    method = {"quant_method": "mixquant", "prefill": prefill, "tail": 1, "min_prompt": 0}  # else most are precise
    policy: dict[str, Any] = {"quantization_config": method}
    llm = LLM(
        folder, hf_overrides=policy if prefill else {}, skip_tokenizer_init=True, max_model_len=2048, max_num_seqs=16,
        max_num_batched_tokens=256 if together else 2048, enforce_eager=not together, enable_prefix_caching=False,
        gpu_memory_utilization=0.1,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    prompts = [{"prompt_token_ids": torch.randint(1, 512, (n,), generator=generator).tolist()} for n in LENGTHS]
    sampling = SamplingParams(temperature=0, max_tokens=24, logprobs=0, ignore_eos=True, detokenize=False)
    batches = [prompts] if together else [[prompt] for prompt in prompts]
    texts = [out.outputs[0] for batch in batches for out in llm.generate(batch, sampling, use_tqdm=False)]
    return [
        (list(text.token_ids), [step[t].logprob for step, t in zip(text.logprobs, text.token_ids, strict=True)])
        for text in texts
    ]


def compare(one: Answers, other: Answers) -> str:
    """Requests with equal tokens, and how far log-probabilities are apart up to the first token that differs: half of
    them by less than the first number, nine in ten by less than the second. The greatest tells nothing: where BF16
    rounds a router's scores to a tie, another batch takes another expert, in any arm."""
    apart, equal = [], 0
    for (tokens, logprobs), (others, their_logprobs) in zip(one, other, strict=True):
        equal += tokens == others
        for a, b, p, q in zip(tokens, others, logprobs, their_logprobs, strict=True):
            apart.append(abs(p - q))
            if a != b:
                break
    tenths = statistics.quantiles(apart, n=10)
    return f"{equal}/{len(one)} requests with equal tokens, log-probs apart by {tenths[4]:.4f}, {tenths[8]:.4f}"


if __name__ == "__main__":
    main()
