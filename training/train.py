"""Train the demo model: a Qwen3 of 9.6M parameters, on one GPU, in minutes.

    PYTHONPATH=src python training/train.py --tokenizer src/mixquant/demo/model --out OUT --steps N

Float32 weights under bfloat16 autocast; Muon for the matrices of the layers, AdamW for embeddings
and norms; a constant rate, then a linear decay to zero. Rows grow from 512 to 1536 tokens
(`data.py`). Rows are never masked: padding is on the right, where causal attention cannot see it.
`--seconds S` instead of `--steps` measures the speed of each row length first and prints the number
of steps that fits. Steps and seed then fix the run up to the GPU's rounding.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are parallel already

import numpy as np
import torch
import torch.nn.functional as F
from data import BATCH_TOKENS, Batches, length_at, render
from muon import Muon
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from mixquant.tasks import LADDER, generate

LENGTHS = (512, 1024, 1536)
MONITOR_LENGTH = 3072
MONITOR_SEED = 1_000_000  # of examples that watch the run; the ladder uses small seeds


def build_config(tokenizer: Any) -> Qwen3Config:
    """Every in_features is a multiple of 128."""
    return Qwen3Config(
        vocab_size=512,
        hidden_size=384,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=3072,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Trainer:
    """Model, optimizers and the loss."""

    def __init__(self, config: Qwen3Config, device: str, rate: float) -> None:
        self.device = device
        self.model = Qwen3ForCausalLM(config).to(device)
        for layer in self.model.model.layers:
            layer.compile(dynamic=False)  # layer by layer: compiled once for each row length
        matrices = [p for p in self.model.model.layers.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=device == "cuda")
        self.optimizers = [Muon(matrices, lr=rate), adam]
        self.peaks = [[g["lr"] for g in o.param_groups] for o in self.optimizers]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """A forward without any mask, which takes the causal FlashAttention path."""
        body = self.model.model
        with torch.autocast(self.device, torch.bfloat16):
            hidden = body.embed_tokens(ids)
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
            rotary = body.rotary_emb(hidden, positions)
            for layer in body.layers:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
            logits: torch.Tensor = self.model.lm_head(body.norm(hidden))
        return logits

    def step(self, rows: torch.Tensor, mask: torch.Tensor, factor: float) -> torch.Tensor:
        """One update with every rate at `factor` of its peak; returns the loss."""
        loss = token_loss(self.logits(rows[:, :-1]), rows[:, 1:], mask)
        loss.backward()
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    def save(self, folder: Path) -> None:
        """Config and weights in bfloat16."""
        plain = Qwen3ForCausalLM(self.model.config).to(torch.bfloat16)
        plain.load_state_dict(self.model.state_dict())
        plain.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=384,
            eos_token_id=plain.config.eos_token_id,
            pad_token_id=plain.config.pad_token_id,
        )
        plain.save_pretrained(folder, max_shard_size="10MB")


@torch.compile(dynamic=False)
def token_loss(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of the tokens under the mask."""
    each = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    weights = mask.flatten().float()
    return (each * weights).sum() / weights.sum()


def schedule(progress: float) -> float:
    """Warm-up over 1 %, constant to 45 %, then linear to zero."""
    return min(1.0, progress / 0.01 + 0.01, (1 - progress) / 0.55)


def fitting_steps(trainer: Trainer, seconds: float) -> int:
    """How many steps of the curriculum take `seconds`; compiles every shape on the way."""
    cost = {}
    for length in LENGTHS:
        rows = torch.randint(5, 500, (BATCH_TOKENS // length, length + 1), device=trainer.device)
        mask = torch.ones_like(rows[:, 1:], dtype=torch.bool)
        for repeat in range(13):
            if repeat == 3:
                trainer.step(rows, mask, 0.0).item()
                start = time.perf_counter()
            trainer.step(rows, mask, 0.0)
        trainer.step(rows, mask, 0.0).item()
        cost[length] = (time.perf_counter() - start) / 11
        print(f"rows of {length}: {BATCH_TOKENS / cost[length] / 1e6:.2f} M tokens/s", flush=True)
    draws = [length_at(i / 1000, Random(i)) for i in range(1000)]
    return int(seconds / (sum(cost[length] for length in draws) / 1000))


class Monitor:
    """Share of examples whose whole reference answer is the model's first choice, token by token.

    That is greedy accuracy in one forward pass, bar answers that err and still end right.
    """

    def __init__(self, tokenizer: Any, count: int = 64) -> None:
        self.batches = {
            (task, rung): self._batch(tokenizer, task, rung, count)
            for task, rungs in LADDER.items()
            for rung in range(len(rungs))
        }

    @staticmethod
    def _batch(tokenizer: Any, task: str, rung: int, count: int) -> tuple[Any, Any]:
        rows = np.full((count, MONITOR_LENGTH + 1), tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((count, MONITOR_LENGTH), dtype=bool)
        for index, row in enumerate(rows):
            example = generate(task, rung, MONITOR_SEED, index)
            prompt = tokenizer.encode(render(example.prompt) + "<|im_start|>assistant\n")
            ids = prompt + tokenizer.encode(example.reference + "<|im_end|>")
            row[: len(ids)] = ids
            mask[index, len(prompt) - 1 : len(ids) - 1] = True
        return torch.from_numpy(rows), torch.from_numpy(mask)

    @torch.no_grad()
    def report(self, trainer: Trainer) -> str:
        """One line of percentages a task, from the first rung to the last."""
        lines: dict[str, list[str]] = {}
        for (task, _), batch in self.batches.items():
            rows, mask = (part.to(trainer.device) for part in batch)
            right = trainer.logits(rows[:, :-1]).argmax(-1) == rows[:, 1:]
            share = (right | ~mask).all(1).float().mean().item()
            token = right[mask].float().mean().item()
            lines.setdefault(task, []).append(f"{100 * share:.0f} ({100 * token:.1f})")
        return "\n".join(f"  {task}: {'  '.join(cells)}" for task, cells in lines.items())


def batches(data: Batches, workers: int, device: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """All batches in order, on the device."""
    loader: Any = torch.utils.data.DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=device == "cuda",
    )
    for rows, mask in loader:
        yield rows.to(device, non_blocking=True), mask.to(device, non_blocking=True)


def train(args: argparse.Namespace) -> None:
    """The whole run."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    trainer = Trainer(build_config(tokenizer), args.device, args.rate)
    monitor = Monitor(tokenizer)
    steps = args.steps or fitting_steps(trainer, args.seconds)
    print(f"{steps} steps of {BATCH_TOKENS} tokens, seed {args.seed}", flush=True)
    data = Batches(f"{args.tokenizer}/tokenizer.json", args.seed, steps)
    start = time.perf_counter()
    for step, (rows, mask) in enumerate(batches(data, args.workers, args.device)):
        loss = trainer.step(rows, mask, schedule(step / steps))
        if step % max(1, steps // 100) == 0:
            passed = time.perf_counter() - start
            print(f"{step} {passed:.0f} s, length {rows.shape[1] - 1}, loss {loss:.4f}", flush=True)
            if step == steps // 100 * 20 and loss > args.abort:
                raise SystemExit(f"the loss is still {loss:.3f} after a fifth of the run")
        last = step == min(args.until or steps, steps) - 1
        if step and (step % max(1, steps // 6) == 0 or last):
            print(monitor.report(trainer), flush=True)
            trainer.save(Path(args.out))
        if last:
            break
    print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", required=True, help="folder for config and weights")
    parser.add_argument("--steps", type=int, help="default: what fits --seconds")
    parser.add_argument("--until", type=int, help="stop after this step of the schedule")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.02, help="Muon's peak rate")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--abort", type=float, default=9.0, help="highest loss after 20 %%")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
