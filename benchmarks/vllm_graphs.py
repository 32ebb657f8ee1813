"""Phase routing inside stock vLLM against stock BF16 and stock uniform FP8: time to first token, decode step, graphs.

    python benchmarks/vllm_phases.py --model-dir /dev/shm/8b        # one GPU of 139 GiB

Three engines (each its own process) share the GPU and take turns within each round, so that all see the same clocks.
The model has the shape of Qwen3-8B and random weights, written once to --model-dir. `phase tail=0` and `phase tail=1`
are one engine whose tail is changed between measurements. Times are wall times of `LLM.generate`, so they hold the
scheduler, the sampler and the trip between the processes; medians over the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.update(VLLM_ALLOW_INSECURE_SERIALIZATION="1", VLLM_LOGGING_LEVEL="INFO")

import torch

from benchmarks import shapes
from benchmarks.nested_linear import milliseconds
from benchmarks.shapes import SHAPES

SIZES = ("8b", "8b-12", "tiny")
ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "phase": {"hf_overrides": {"quantization_config": {"quant_method": "mixquant", "prefill": "fp8"}}},
    "uniform fp8": {"quantization": "fp8"},
}
ARMS: dict[str, tuple[str, int | None]] = {
    "bf16": ("bf16", None),
    "uniform fp8": ("uniform fp8", None),
    "phase tail=0": ("phase", 0),
    "phase tail=1": ("phase", 1),
}
PREFIX = 16384
DECODED = 64
seeds = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=float, default=0.28, help="share of the GPU for each engine")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shapes.write(args.size, args.model_dir, weights=True)
    engines = {name: start(name, args) for name in args.engines.split(",")}
    arms = {arm: choice for arm, choice in ARMS.items() if choice[0] in engines}
    bench = Bench(engines, arms, args.rounds)
    tiny = args.size == "tiny"
    rows = bench.table(
        first_tokens=(64, 128) if tiny else (2048, 8192, 32768),
        cached=(16, 48) if tiny else (128, 256, 512),
        prefix=256 if tiny else PREFIX,
        batch=4 if tiny else 32,
        batch_tokens=64 if tiny else 2048,
    )
    facts = {"exactness": bench.graphs_change_nothing()}
    print(json.dumps(facts), flush=True)
    if torch.cuda.is_available():
        facts |= {"a read of the BF16 weights": weight_reads(SHAPES[args.size]), "profile": bench.profiles()}
        print(json.dumps(facts, indent=2))
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, **facts}, indent=2))


def start(name: str, args: argparse.Namespace) -> Any:
    """A vLLM engine with vLLM's own defaults but for the batch's size and the memory share."""
    from vllm import LLM

    begin = time.perf_counter()
    tiny = args.size == "tiny"
    sizes = {"max_model_len": 1024} if tiny else {"max_model_len": 33024, "max_num_batched_tokens": 8192}
    on_cpu = not torch.cuda.is_available()
    llm = LLM(
        str(args.model_dir), skip_tokenizer_init=True, gpu_memory_utilization=args.memory, max_num_seqs=256,
        enable_prefix_caching=True, seed=0, **({"enforce_eager": True} if on_cpu else {}), **sizes, **ENGINES[name],
    )  # fmt: skip
    print(f"{name}: ready in {time.perf_counter() - begin:.0f} s", flush=True)
    return llm


def set_tail(worker: Any, tail: int) -> None:
    worker.model_runner.vllm_config.quant_config.state.tail = tail


class Bench:
    """Takes each measurement of every arm in turn, round by round."""

    def __init__(
        self,
        engines: dict[str, Any],
        arms: dict[str, tuple[str, int | None]],
        rounds: int,
        say: Callable[[str], object] = print,
    ) -> None:
        self.engines, self.arms, self.rounds, self.say = engines, arms, rounds, say

    def table(
        self, first_tokens: Sequence[int], cached: Sequence[int], prefix: int, batch: int, batch_tokens: int
    ) -> list[dict[str, Any]]:
        """Print and return one row for each workload: milliseconds of every arm, and the ratio to the first arm."""
        print(f"\n| ms, median of {self.rounds} | " + " | ".join(self.arms) + " | ratios to BF16 |")
        print("|---" * (len(self.arms) + 2) + "|")
        rows = []
        for tokens in first_tokens:
            rows.append(self.row(f"TTFT, {tokens} tokens", lambda llm, n=tokens: seconds(llm, fresh(1, n), 1)))
        rows.append(
            self.row(f"TTFT, {batch} x {batch_tokens}", lambda llm: seconds(llm, fresh(batch, batch_tokens), 1))
        )
        base = fresh(1, prefix)[0]
        for new in cached:
            work = lambda llm, n=new: seconds(llm, [base + fresh(1, n)[0]], 1)  # noqa: E731
            rows.append(self.row(f"TTFT, {new} new on {prefix} cached", work, warm=lambda llm: seconds(llm, [base], 1)))
        for size in (1, batch):
            prompts = fresh(size, batch_tokens)
            rows.append(self.row(f"decode step, batch {size}", lambda llm, p=prompts: decode_step(llm, p)))
        return rows

    def row(
        self, name: str, work: Callable[[Any], float], warm: Callable[[Any], object] | None = None
    ) -> dict[str, Any]:
        times: dict[str, list[float]] = {arm: [] for arm in self.arms}
        for turn in range(-1, self.rounds):
            for arm, (engine, tail) in self.arms.items():
                llm = self.engines[engine]
                if tail is not None:
                    llm.collective_rpc(set_tail, args=(tail,))
                if warm and turn < 0:
                    warm(llm)
                measured = 1e3 * work(llm)
                if turn >= 0:  # the first turn warms up
                    times[arm].append(measured)
        medians = {arm: statistics.median(values) for arm, values in times.items()}
        first = next(iter(medians.values()))
        ratios = " / ".join(f"{first / value:.2f}" for value in medians.values())
        self.say(f"| {name} | " + " | ".join(f"{value:.2f}" for value in medians.values()) + f" | {ratios} |")
        return {"workload": name, "ms": medians, "all_ms": times}

    def graphs_change_nothing(self) -> dict[str, Any]:
        """Answers of the phase engine with graphs, without any, and of another engine as a control."""
        llm = self.engines["phase"]
        llm.collective_rpc(set_tail, args=(1,))
        prompts = [fresh(1, n)[0] for n in (1, 3, 60, 130, 260, 410, 500, 900)]
        with_graphs = logprobs(llm, prompts)
        llm.collective_rpc(forbid_graphs, args=(True,))
        without = logprobs(llm, prompts)
        llm.collective_rpc(forbid_graphs, args=(False,))
        control = logprobs(self.engines[next(iter(self.engines))], prompts)
        differences = {"graphs": difference(with_graphs, without), "control bf16": difference(with_graphs, control)}
        return {"first token's greatest log-prob difference": differences}

    def profiles(self) -> dict[str, Any]:
        """CUDA graph launches and FP8 quantizations of one step of each kind, from torch's profiler."""
        llm = self.engines["phase"]
        prompt = fresh(1, 512)[0]
        seconds(llm, [prompt], 1)
        report = {}
        for name, batch, new in (
            ("4,096 prompt tokens", fresh(1, 4096), 1),
            ("256 prompt tokens", fresh(1, 256), 1),
            ("a cached prompt of 512 tokens: its last block", [prompt], 1),
            ("the same and 8 decode steps", [prompt], 9),
        ):
            llm.collective_rpc(start_profile)
            seconds(llm, batch, new)
            report[name] = llm.collective_rpc(stop_profile)[0]
        return report


def weight_reads(sizes: dict[str, int]) -> dict[str, float]:
    """Milliseconds that all BF16 linear layers of the model take for few rows: the price of a step's precise rows."""
    hidden, inner, head = sizes["hidden_size"], sizes["intermediate_size"], 128
    heads = sizes["num_attention_heads"]
    products = [((heads + heads // 2) * head, hidden), (hidden, heads * head), (2 * inner, hidden), (hidden, inner)]
    layers = [[torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in products] for _ in range(6)]
    repeats = sizes["num_hidden_layers"] // len(layers)
    report = {"floor at 4.8 TB/s": sum(w.nbytes for layer in layers for w in layer) * repeats / 4.8e9}
    for rows in (1, 16, 32, 64, 128):
        inputs = {k: torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _, k in products}

        def step(inputs: dict[int, torch.Tensor] = inputs) -> None:
            for layer in layers:
                for weight in layer:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        report[f"{rows} rows"] = milliseconds(step, 20) * repeats
    return {name: round(value, 2) for name, value in report.items()}


def fresh(count: int, length: int) -> list[list[int]]:
    """Prompts that no engine has seen."""
    generator = torch.Generator().manual_seed(next(seeds))
    return torch.randint(10, 1000, (count, length), generator=generator).tolist()


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


def logprobs(llm: Any, prompts: list[list[int]]) -> list[dict[int, float]]:
    """The 20 likeliest first tokens of each prompt's answer and their log-probabilities, one request at a time."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=20, detokenize=False)
    llm.reset_prefix_cache()
    outputs = [llm.generate([{"prompt_token_ids": p}], sampling, use_tqdm=False)[0].outputs[0] for p in prompts]
    return [{token: entry.logprob for token, entry in output.logprobs[0].items()} for output in outputs]


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
