"""The demo model's ladder, arm by arm: answers right, and KL divergence to BF16.

    python benchmarks/ladder.py --n 200 --arms bf16,uniform-nvfp4,nvfp4      # prints a Markdown table

Arms are policy presets. Rungs were fixed on BF16 accuracy alone, on other examples (training/README.md). The standard
error of an accuracy is binomial; that of a KL divergence counts examples, not tokens, as independent.
"""

from __future__ import annotations

import argparse
import math
import sys

import torch
from transformers import PreTrainedModel

from mixquant import generation, models
from mixquant.accounting import kernels_used
from mixquant.evaluate import tasks
from mixquant.evaluate.divergence import answer_logits
from mixquant.evaluate.free_run import answer_texts
from mixquant.metrics import Estimate, estimate, kl_divergence
from mixquant.policy import Policy

SEED = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--n", type=int, default=200, help="examples a rung")
    parser.add_argument("--kld-n", type=int, default=50, help="examples a rung for the KL divergence")
    parser.add_argument("--arms", default="bf16,uniform-nvfp4,nvfp4,uniform-int8,int8")
    parser.add_argument("--tasks", default=",".join(tasks.LADDER))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device")
    args = parser.parse_args()
    device = models.parse_device(args.device)
    arms = {name: models.load_model(args.model, Policy.parse(name), device) for name in args.arms.split(",")}
    print(f"{generation.device_name(device)}, {args.n} examples a rung, data seed {SEED}\n")
    for name, model in arms.items():
        used = kernels_used(model)
        print(f"- `{name}`: prefill {'+'.join(used['prefill'])}, decode {'+'.join(used['decode'])}")
    print("\nAnswers right, and below it the mean KL divergence to BF16 at the reference answer's tokens.\n")
    print("| task | steps | records | " + " | ".join(arms) + " |")
    print("|---" * (3 + len(arms)) + "|")
    for task in args.tasks.split(","):
        show_task(task, arms, args)


def show_task(task: str, arms: dict[str, PreTrainedModel], args: argparse.Namespace) -> None:
    """All rungs of a task share batches: rows are independent, and decoding costs steps, not sequences."""
    tokenizer = models.load_tokenizer(args.model)
    ladder = tasks.LADDER[task]
    examples = [tasks.generate(task, rung, SEED, i) for rung in ladder for i in range(args.n)]
    prompts = [generation.encode(tokenizer, list(example.messages))[0].tolist() for example in examples]
    answers = [tokenizer(example.reference, add_special_tokens=False).input_ids for example in examples]
    forced = [i for i in range(len(examples)) if i % args.n < args.kld_n]
    right: dict[str, list[bool]] = {}
    klds: dict[str, list[float]] = {}
    reference: list[torch.Tensor] = []
    for name, model in arms.items():
        print(f"{task}: {name}", file=sys.stderr)
        texts = answer_texts(model, tokenizer, prompts, [len(answer) + 8 for answer in answers], args.batch)
        right[name] = [tasks.check(example, text) for example, text in zip(examples, texts, strict=True)]
        logits = answer_logits(
            model, [prompts[i] for i in forced], [answers[i] for i in forced], max(1, args.batch // 4)
        )
        reference = reference or logits
        klds[name] = [float(kl_divergence(r, q).mean()) for r, q in zip(reference, logits, strict=True)]
    for place, rung in enumerate(ladder):
        start, forced_start = place * args.n, place * min(args.n, args.kld_n)
        accuracy = [cell(right[name][start : start + args.n]) for name in arms]
        print(f"| {task} | {rung.steps} | {rung.records} | " + " | ".join(accuracy) + " |")
        kld = [estimate(klds[name][forced_start : forced_start + min(args.n, args.kld_n)]) for name in arms]
        print("| | | | " + " | ".join(divergence(value) for value in kld) + " |", flush=True)


def cell(right: list[bool]) -> str:
    mean = sum(right) / len(right)
    return f"{100 * mean:.1f} ± {100 * math.sqrt(mean * (1 - mean) / len(right)):.1f} %"


def divergence(value: Estimate) -> str:
    return str(value) if value.mean else "0"


if __name__ == "__main__":
    main()
