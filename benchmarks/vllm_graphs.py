"""CUDA graphs of phase routing in stock vLLM: launches by step, and answers with graphs against answers without.

    python benchmarks/vllm_graphs.py --model-dir /dev/shm/8b        # one GPU of 139 GiB

A model of Qwen3-8B's shape with random weights, written once to --model-dir, FP8 prompts, two copies, a tail of 1 and
no `min_prompt`, so that every prompt has rows of both phases. Stock BF16 is the control of the answers. Times are
`mixquant bench`'s. On a CPU, which has no graphs, `--size tiny` tries it out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_LOGGING_LEVEL="INFO")

import torch

from benchmarks import shapes

POLICY = {"quant_method": "mixquant", "prefill": "fp8", "tail": 1, "min_prompt": 0, "storage": "separate"}
seeds = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--size", choices=("8b", "8b-12", "tiny"), default="8b")
    parser.add_argument("--memory", type=float, default=0.28, help="share of the GPU for each engine")
    args = parser.parse_args()
    shapes.write(args.size, args.model_dir, weights=True)
    phase = start(args, {"hf_overrides": {"quantization_config": POLICY}})
    print(json.dumps(graphs_change_nothing(phase, start(args, {}))), flush=True)
    if torch.cuda.is_available():
        print(json.dumps(profiles(phase), indent=2))


def start(args: argparse.Namespace, options: dict[str, Any]) -> Any:
    """A vLLM engine with vLLM's own defaults but for the batch's size and the memory share."""
    from vllm import LLM

    from mixquant.integrations.vllm import register

    register()  # where mixquant runs from a checkout, no entry point does it
    tiny, on_cpu = args.size == "tiny", not torch.cuda.is_available()
    sizes = {"max_model_len": 1024} if tiny else {"max_model_len": 33024, "max_num_batched_tokens": 8192}
    return LLM(
        str(args.model_dir), skip_tokenizer_init=True, gpu_memory_utilization=args.memory, max_num_seqs=256,
        enable_prefix_caching=True, seed=0, **({"enforce_eager": True} if on_cpu else {}), **sizes, **options,
    )  # fmt: skip


def graphs_change_nothing(phase: Any, stock: Any) -> dict[str, list[float]]:
    """The greatest log-probability difference of each prompt's first token: with graphs to without, and to stock."""
    prompts = [fresh(n) for n in (1, 3, 60, 130, 260, 410, 500, 900)]
    with_graphs = logprobs(phase, prompts)
    phase.collective_rpc(forbid_graphs, args=(True,))
    without = logprobs(phase, prompts)
    phase.collective_rpc(forbid_graphs, args=(False,))
    control = logprobs(stock, prompts)
    return {"graphs": difference(with_graphs, without), "control: stock BF16": difference(with_graphs, control)}


def profiles(llm: Any) -> dict[str, Any]:
    """CUDA graph launches and FP8 quantizations of one step of each kind, from torch's profiler."""
    prompt = fresh(512)
    generate(llm, prompt, 1)
    report = {}
    for name, asked, new in (
        ("4,096 prompt tokens", fresh(4096), 1),
        ("256 prompt tokens", fresh(256), 1),
        ("a cached prompt of 512 tokens: its last block", prompt, 1),
        ("the same and 8 decode steps", prompt, 9),
    ):
        llm.collective_rpc(start_profile)
        generate(llm, asked, new)
        report[name] = llm.collective_rpc(stop_profile)[0]
    return report


def fresh(length: int) -> list[int]:
    """A prompt that no engine has seen."""
    generator = torch.Generator().manual_seed(next(seeds))
    return torch.randint(10, 1000, (length,), generator=generator).tolist()


def generate(llm: Any, prompt: list[int], new_tokens: int, **options: Any) -> Any:
    """The greedy answer to one prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, **options)
    return llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]


def logprobs(llm: Any, prompts: list[list[int]]) -> list[dict[int, float]]:
    """The 20 likeliest first tokens of each prompt's answer and their log-probabilities, one request at a time."""
    llm.reset_prefix_cache()
    steps = [generate(llm, prompt, 1, logprobs=20).logprobs[0] for prompt in prompts]
    return [{token: entry.logprob for token, entry in step.items()} for step in steps]


def difference(one: list[dict[int, float]], other: list[dict[int, float]]) -> list[float]:
    """Greatest over the three likeliest tokens of each prompt."""
    pairs = zip(one, other, strict=True)
    return [round(max(abs(a[token] - b.get(token, -99)) for token in list(a)[:3]), 4) for a, b in pairs]


def forbid_graphs(worker: Any, forbid: bool) -> None:
    """Let no step with prompt rows use a graph (test only)."""
    from mixquant.integrations.vllm.places import Graphs

    if forbid:
        worker.bench_find, Graphs.find = Graphs.find, lambda self, rows, precise: None  # type: ignore[method-assign]
    else:
        Graphs.find = worker.bench_find  # type: ignore[method-assign]


def start_profile(worker: Any) -> None:
    worker.bench_profile = torch.profiler.profile()
    worker.bench_profile.__enter__()


def stop_profile(worker: Any) -> dict[str, int]:
    torch.cuda.synchronize()
    worker.bench_profile.__exit__(None, None, None)
    counts: Counter[str] = Counter()
    for event in worker.bench_profile.events():
        counts["graph launches"] += event.name == "cudaGraphLaunch"
        counts["FP8 quantizations"] += "scaled_fp8_quant" in event.name and event.device_type.name == "CUDA"
        counts["kernels"] += event.device_type.name == "CUDA"
    return dict(counts)


if __name__ == "__main__":
    main()
