"""Accuracy of a model on the ladder of tasks, by greedy generation.

    PYTHONPATH=src python training/ladder.py src/mixquant/demo/model --n 200 --device cuda

Prints one line a rung: accuracy, its standard error, n, and the mean tokens of prompt and answer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixquant.evaluate.tasks import LADDER, Example, check, generate

SEED = 0


def evaluate(model: Any, tokenizer: Any, n: int, *, seed: int = SEED, batch: int = 256) -> Iterator[dict[str, Any]]:
    """One row for every rung of every task."""
    for task, rungs in LADDER.items():
        for rung in rungs:
            examples = [generate(task, rung, seed, index) for index in range(n)]
            right, tokens = 0, 0
            for start in range(0, n, batch):
                chosen = examples[start : start + batch]
                texts, read = answer(model, tokenizer, chosen)
                right += sum(map(check, chosen, texts))
                tokens += read
            share = right / n
            yield {
                "task": task,
                "steps": rung.steps,
                "records": rung.records,
                "accuracy": share,
                "se": (share * (1 - share) / n) ** 0.5,
                "n": n,
                "prompt_tokens": tokens / n,
            }


def answer(model: Any, tokenizer: Any, examples: list[Example]) -> tuple[list[str], int]:
    """The model's text for each example, and the tokens of all prompts."""
    prompts = tokenizer.apply_chat_template(
        [example.messages for example in examples],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    limit = max(len(tokenizer(example.reference)["input_ids"]) for example in examples) + 16
    with torch.inference_mode():
        output = model.generate(**prompts, max_new_tokens=limit, do_sample=False)
    written = output[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts, int(prompts["attention_mask"].sum())


HEAD = """| task | steps | records | prompt tokens | accuracy | standard error | n |
|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    cells = f"{row['task']} | {row['steps']} | {row['records']} | {row['prompt_tokens']:.0f}"
    return f"| {cells} | {row['accuracy']:.3f} | {row['se']:.3f} | {row['n']} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also write the rows to this file")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).to(args.device)
    start = time.perf_counter()
    print(HEAD)
    rows = []
    for row in evaluate(model, tokenizer, args.n, seed=args.seed, batch=args.batch):
        rows.append(row)
        print(line(row), flush=True)
    print(f"{time.perf_counter() - start:.0f} s on {args.device}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
