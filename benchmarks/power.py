"""What the evaluator's test finds: power against a planted fault, as the number of examples grows.

    python benchmarks/power.py --n 50        # prints the tables that benchmarks/results/ keeps

The fault: one E4M3 code more on 1 % of one layer's block scales, in the NVFP4 weights that read the prompt. The demo
model answers the agent tasks' first rung in the phase arm, with the fault and without; KL divergences are measured at
forced answers. Power is the share of 1,000 runs, drawn with replacement from the examples measured, that `decide`
calls different. Nothing but the divergence is measured here: both arms count as right everywhere.

Two ways to look for it. *Against the healthy arm*, whose floor is the healthy arm in batches of another composition:
power, and on how many of the examples measured the fault is further off than the floor. *Against BF16*: on how many
the faulty arm is further from BF16 than the healthy one is, to be compared with a coin. There is no power to be drawn
from that one: runs larger than the measurement would only repeat its own chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from mixquant import tasks
from mixquant.checkpoint.locate import find
from mixquant.evaluate.comparison import ALPHA, Comparison, Scores, compare, decide
from mixquant.evaluate.engine import Query
from mixquant.evaluate.metrics import estimate, kl_divergence
from mixquant.formats import nvfp4
from mixquant.formats.scales import RULES
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.kernels.emulation import EmulatedNVFP4
from mixquant.model.linear import PhaseLinear
from mixquant.prompts import token_ids

SEED = 7
SHARE = 0.01
FAULTS = tuple(
    f"model.layers.{layer}"
    for layer in ("0.mlp.down_proj", "3.self_attn.o_proj", "6.mlp.up_proj", "7.self_attn.k_proj", "7.mlp.down_proj")
)
SIZES = (5, 10, 20, 50, 100, 1000)
RUNS = 1000


class Suite:
    """Prompts and their right answers, which are forced on every arm."""

    def __init__(self, n: int) -> None:
        tokenizer = load_tokenizer(find("demo"))
        examples = [tasks.generate(task, 0, SEED, i) for i in range(n) for task in tasks.LADDER]
        self.answers = [tokenizer(example.reference, add_special_tokens=False).input_ids for example in examples]
        self.queries = [
            Query(example.prompt, token_ids(tokenizer, example.prompt), len(answer))
            for example, answer in zip(examples, self.answers, strict=True)
        ]

    def logits(self, backend: TransformersBackend, arm: str, batch: int = 8, reverse: bool = False) -> list[Tensor]:
        """Logits at every answer, in the order of the examples; `batch` and `reverse` are the batches' composition."""
        order = list(range(len(self.queries)))[:: -1 if reverse else 1]
        engine = backend.open(arm)
        found: dict[int, Tensor] = {}
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            logits = engine.score([self.queries[i] for i in rows], [self.answers[i] for i in rows])
            found.update(zip(rows, logits, strict=True))
        return [found[i] for i in range(len(order))]


def open_backend(fault: str | None = None) -> TransformersBackend:
    """The demo model in NVFP4, with the fault in one layer's prefill weights."""
    backend = TransformersBackend.load(find("demo"), "nvfp4", torch.device("cpu"))
    if fault:
        plant_fault(backend.model.get_submodule(fault))
    return backend


def plant_fault(layer: PhaseLinear) -> None:
    """One code more on a random 1 % of the block scales (448, the largest, stays)."""
    weight = layer.weight
    healthy = nvfp4.quantize_weight(weight, RULES["search"])
    codes = healthy.scales.view(torch.uint8)
    hit = torch.rand(codes.shape, generator=torch.Generator().manual_seed(0)) < SHARE
    scales = torch.where(hit & (codes < 0x7E), codes + 1, codes).view(torch.float8_e4m3fn)
    layer.prefill = EmulatedNVFP4(nvfp4.NVFP4Tensor(healthy.packed, scales, healthy.global_scale), weight.dtype)


def scores(reference: Sequence[Tensor], arm: Sequence[Tensor]) -> Scores:
    """Divergence of one arm's logits from the reference's; every answer counts as right."""
    klds = [float(kl_divergence(p, q).mean()) for p, q in zip(reference, arm, strict=True)]
    return Scores([True] * len(klds), klds)


def power(arm: Scores, against: Scores, floor: Scores | None, size: int, rng: Random) -> float:
    """Share of `RUNS` resampled runs of `size` examples that call the two arms different."""
    found = 0
    for _ in range(RUNS):
        rows = rng.choices(range(len(arm.right)), k=size)
        drawn = [sample(column, rows) for column in (arm, against)]
        found += decide([compare(*drawn, sample(floor, rows) if floor else None)])[0].different
    return found / RUNS


def sample(column: Scores, rows: Sequence[int]) -> Scores:
    return Scores([column.right[i] for i in rows], None if column.kld is None else [column.kld[i] for i in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=50, help="examples a task")
    suite = Suite(parser.parse_args().n)
    print(f"{len(suite.queries)} examples, alpha {ALPHA:g}, fault: +1 E4M3 code on {SHARE:.0%} of one layer's scales\n")
    backend = open_backend()
    bf16 = suite.logits(backend, "bf16")
    healthy = suite.logits(backend, "phase")
    floor = scores(healthy, suite.logits(backend, "phase", batch=5, reverse=True))
    itself = Scores([True] * len(healthy))
    columns = ["arm", "KLD", *(f"n = {size}" for size in SIZES), "further", "KLD from bf16", "further than healthy"]
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    show("healthy, other batches", estimate(floor.kld))
    for fault in FAULTS:
        logits = suite.logits(open_backend(fault), "phase")
        arm, from_bf16 = scores(healthy, logits), scores(bf16, logits)
        found = [power(arm, itself, floor, size, Random(size)) for size in SIZES]
        seen, hidden = compare(arm, itself, floor), compare(from_bf16, scores(bf16, healthy))
        show(fault, estimate(arm.kld), *found, share(seen), estimate(from_bf16.kld), share(hidden))


def share(comparison: Comparison) -> str:
    """On how many of the examples measured the arm is further off than its baseline, and the p-value of that."""
    if comparison.kld_further is None:
        return "none differs"
    return f"{comparison.kld_further:.0%}, p = {comparison.kld_p:.1g}"


def show(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
