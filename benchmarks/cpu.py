"""INT8 prefill against prepacked BF16 on one CPU thread, and the cost of NVFP4 emulation.

    python benchmarks/cpu.py                 # prints the tables that benchmarks/results/ keeps, one file per machine

A Qwen3-shaped model of about 400M random parameters (8 layers of a 1B model) reads 512 tokens and writes 16. Arms
take turns within each round and medians of CPU time are compared: with one thread that is wall time less interruptions.
A CPU without VNNI has no INT8 to compare, and shows single layers only.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

import mixquant
from mixquant import kernels
from mixquant.devices import device_name
from mixquant.formats import int8, quantizer
from mixquant.kernels.cpu import Int8OneDNN
from mixquant.kernels.emulation import EmulatedNVFP4
from mixquant.policy import Policy

PROMPT, ANSWER = 512, 16
POLICIES = {
    "bf16": Policy(prefill="bf16"),
    "int8 tail=0": Policy(prefill="int8", tail=0),
    "int8 tail=1": Policy(prefill="int8", tail=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{device_name(torch.device('cpu'))}, {cpu_model()}, torch {torch.__version__}")
    int8 = isinstance(Int8OneDNN.check(torch.device("cpu"), torch.bfloat16), kernels.Accepted)
    compare_linears(args.rounds, int8)
    if int8:
        compare_models(args.rounds, args.layers)


def compare_models(rounds: int, layers: int) -> None:
    """Prefill and decode of whole models."""
    plain = random_model(layers)
    models = {name: mixquant.convert_(copy.deepcopy(plain), policy) for name, policy in POLICIES.items()}
    ids = torch.randint(0, plain.config.vocab_size, (1, PROMPT))
    prefill = medians({name: lambda m=m: generate(m, ids, 1) for name, m in models.items()}, rounds)
    whole = medians({name: lambda m=m: generate(m, ids, 1 + ANSWER) for name, m in models.items()}, rounds)
    parameters = sum(p.numel() for p in plain.parameters())
    print(f"\nmodel of {parameters / 1e6:.0f}M parameters, {PROMPT} prompt tokens, CPU time in ms, one thread")
    print(f"{'arm':<14}{'prefill':>9}{'speed-up':>10}{'decode/token':>14}{'ratio':>8}")
    decode = {name: (whole[name] - prefill[name]) / ANSWER for name in models}
    for name in models:
        print(
            f"{name:<14}{prefill[name]:>9.1f}{prefill['bf16'] / prefill[name]:>9.2f}x{decode[name]:>14.2f}"
            f"{decode[name] / decode['bf16']:>8.3f}"
        )
    floor = prefill["int8 tail=0"] + decode["bf16"]
    print(f"floor of tail=1 (tail=0 and one BF16 decode step): {floor:.1f} ms, {prefill['bf16'] / floor:.2f}x")


def compare_linears(rounds: int, with_int8: bool) -> None:
    """One 4096x1024 layer at 512 rows; with VNNI also the INT8 product alone: the floor of any INT8 prefill."""
    weight, x = torch.randn(4096, 1024, dtype=torch.bfloat16), torch.randn(512, 1024, dtype=torch.bfloat16)
    bf16 = kernels.select("bf16", weight.device, weight.dtype)(weight)
    nvfp4 = EmulatedNVFP4.from_weight(weight, quantizer("nvfp4"))
    steps: dict[str, Callable[[], object]] = {
        "bf16 F.linear": lambda: nn.functional.linear(x, weight),
        f"bf16 {bf16.name}": lambda: bf16(x, None),
        **(int8_steps(weight, x) if with_int8 else {}),
        "nvfp4 emulation": lambda: nvfp4(x, None),
    }
    times = medians(steps, rounds * 5)
    print("\nlinear 4096x1024, 512 rows, CPU time in ms, one thread")
    for name, milliseconds in times.items():
        print(f"{name:<24}{milliseconds:>8.2f}{milliseconds / times['bf16 F.linear']:>8.2f} x F.linear")


def int8_steps(weight: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    kernel = Int8OneDNN.from_weight(weight, int8.quantize)
    codes = torch.randint(0, 255, x.shape, dtype=torch.uint8)
    zeros, scales = torch.zeros(len(weight), dtype=torch.int64), kernel.weight_scales
    return {
        "int8 W8A8": lambda: kernel(x, None),
        "int8 product alone": lambda: torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 128, kernel.weight, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        ),
    }


def medians(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each step; the steps take turns, after one warm-up round."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if turn:
                samples[name].append((time.process_time() - start) * 1e3)
    return {name: statistics.median(values) for name, values in samples.items()}


def random_model(layers: int, **changes: object) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 1024, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096,
    }  # fmt: skip
    config = Qwen3Config(**sizes | changes)
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


@torch.inference_mode()
def generate(model: nn.Module, ids: torch.Tensor, tokens: int) -> None:
    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # type: ignore[operator]


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
