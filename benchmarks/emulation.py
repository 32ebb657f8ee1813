"""What emulating NVFP4 on a GPU costs: prefill in Transformers, in BF16 and with emulated NVFP4 prompts, taking turns.

    python benchmarks/emulation.py [--layers 8] [--json FILE]      # one CUDA GPU; half a minute

The model has Qwen3-8B's layers, fewer of them, and random weights. Emulation keeps weights as exact BF16 and rounds
activations to NVFP4 before each product, so BF16 is the most that it can reach: what counts is that models can be
evaluated in NVFP4 at a speed near their own. Never a speed of NVFP4. Medians of the rounds, in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

import mixquant

PROMPTS = ((1, 2048), (1, 8192), (16, 512))
ROUNDS = 7
ARMS = {"BF16": None, "phase": {"prefill": "nvfp4", "scales": "amax"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda", help="a CPU runs the smallest model: a trial of the script")
    args = parser.parse_args()
    device = torch.device(args.device)
    arms = {name: model(args.layers, device, policy) for name, policy in ARMS.items()}
    kernel = mixquant.explain(arms["phase"])[0]["prefill"]["kernel"]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {args.layers} layers, prompts by {kernel}\n")
    print("| prompts | BF16 | emulated | of BF16's speed |\n|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for count, length in PROMPTS:
        ids = torch.randint(0, 1000, (count, length if device.type == "cuda" else 32), device=device)
        found: dict[str, list[float]] = {arm: [] for arm in arms}
        for turn in range(ROUNDS + 2):
            for arm, each in arms.items():
                found[arm] += [prefill(each, ids)] * (turn >= 2)
        bf16, emulated = (statistics.median(times) for times in found.values())
        print(f"| {count} x {ids.shape[1]} | {bf16:.1f} | {emulated:.1f} | {bf16 / emulated:.2f} |", flush=True)
        rows.append({"prompts": count, "tokens": ids.shape[1], "ms": found})
        if args.json:
            args.json.write_text(json.dumps({"device": name, "kernel": kernel, "rows": rows}, indent=1))


def model(layers: int, device: torch.device, policy: dict[str, str] | None) -> PreTrainedModel:
    small = {"hidden_size": 128, "intermediate_size": 256}
    sizes = small if device.type == "cpu" else {"hidden_size": 4096, "intermediate_size": 12288}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config = Qwen3Config(**sizes, **heads, num_hidden_layers=layers, vocab_size=151936, dtype="bfloat16")
    torch.manual_seed(0)
    with device:
        made = AutoModelForCausalLM.from_config(config).eval()
    return made if policy is None else mixquant.convert_(made, policy)


@torch.no_grad()
def prefill(arm: PreTrainedModel, ids: torch.Tensor) -> float:
    """Milliseconds to the logits of the last token."""
    if ids.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    arm(ids, logits_to_keep=1).logits.cpu()
    return 1e3 * (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
