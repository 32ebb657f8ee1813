"""What each step of `mixquant quantize` gains in a model's answers: KL divergence to BF16, recipe by recipe.

    python benchmarks/quantize_gains.py WORK [EXAMPLES]   # prints the tables that benchmarks/results/ keeps (one GPU)

The demo model is quantized by every recipe, into WORK, and read by the evaluator's own engine. BF16 writes an answer;
each recipe is forced to it, and an example's figure is the mean divergence over its tokens. All recipes answer the same
examples, so they are compared to plain amax example by example: the relative change of the mean with a paired
bootstrap's 95 % interval, and an exact sign test. `typical` is the same change of the geometric mean, on which no
single example weighs more than another.

Examples. The hardest rung of each of the four agent tasks, seed 5, which neither training nor calibration saw: where
quantization hurts most, and where the model reads more records than it was trained on. It was chosen by the published
report of another run, before any recipe was compared.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

import mixquant
from mixquant.checkpoint.locate import find
from mixquant.devices import device_name, parse_device
from mixquant.evaluate.items import Place
from mixquant.evaluate.items import measure as measure_items
from mixquant.evaluate.metrics import Interval, estimate, kl_divergence
from mixquant.evaluate.significance import sign_test
from mixquant.evaluate.suites import ladders
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.tasks import LADDER

SEED, EXAMPLES, BATCH, RESAMPLES = 5, 512, 64, 10_000
ARMS = ("phase", "uniform")
RECIPES: dict[str, dict[str, Any]] = {
    "amax": {"scales": "amax", "calibration": None},
    "amax, calibrated": {"scales": "amax"},
    "search": {"calibration": None},
    "search, calibrated": {"gptq": False},
    "gptq": {"gptq": True},
    "fold, search": {"fold": True, "gptq": False},
    "fold, gptq": {"fold": True, "gptq": True},
}
STEPS = (
    ("amax, calibrated", "search, calibrated"),
    ("search, calibrated", "gptq"),
    ("search, calibrated", "fold, search"),
    ("gptq", "fold, gptq"),
)
TINY = 1e-12  # nats, below what rounding leaves
COLUMNS = f"{'change':>9}{'95 % interval':>18}{'sign test':>11}{'typical':>9}"
Klds = dict[str, dict[str, list[float]]]
"""By arm and recipe: one figure an example, in nats, a mean over the answer's tokens."""


def main() -> None:
    work, examples = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else EXAMPLES
    device, start = parse_device(None), time.perf_counter()
    loaded = {recipe: quantized(work / recipe, recipe, device) for recipe in RECIPES}
    print(f"{device_name(device)}, torch {torch.__version__}; {examples} examples of each task")
    klds: Klds = {arm: {recipe: [] for recipe in RECIPES} for arm in ARMS}
    for task in LADDER:
        for first in range(0, examples, BATCH):
            measure(loaded, task, range(first, min(first + BATCH, examples)), klds)
    for arm in ARMS:
        show(f"{arm} arm", klds[arm])
    print(f"\n{time.perf_counter() - start:.0f} s")


# ---------------------------------------------------------------------------------------------- measuring


def quantized(folder: Path, recipe: str, device: torch.device) -> Any:
    """The model of a recipe, from its folder, which is written unless it is there."""
    options = dict(RECIPES[recipe])
    policy = {"prefill": "nvfp4", "scales": options.pop("scales", "search")}
    if not folder.exists():
        mixquant.quantize("demo", policy, output=folder, device=device.type, **options)
    return load_model(find(folder), "nvfp4", device)


def measure(loaded: dict[str, Any], task: str, indices: range, klds: Klds) -> None:
    """Add one batch's divergences in all recipes and arms; BF16 is the same model in all of them."""
    tokenizer = load_tokenizer(find("demo"))
    rung = ladders.rungs(task)[-1]
    asked = [(Place(task, 0, SEED, index), rung.ask(tokenizer, SEED, index)) for index in indices]
    items = measure_items(tokenizer, asked)
    queries = [item.query for item in items]
    reference = TransformersBackend(loaded["amax"]).open("bf16")
    answers = reference.generate(queries, [item.draft for item in items])
    exact = reference.score(queries, answers)
    for recipe, model in loaded.items():
        backend = TransformersBackend(model)  # a new one holds no earlier prompt
        for arm in ARMS:
            scores = backend.open(arm).score(queries, answers)
            klds[arm][recipe] += [float(kl_divergence(p, q).mean()) for p, q in zip(exact, scores, strict=True)]


# ---------------------------------------------------------------------------------------------- comparing


def show(title: str, klds: dict[str, list[float]]) -> None:
    print(f"\n{title:<30}{'mean KLD':>22}{'median':>10}{COLUMNS}")
    for recipe, values in klds.items():
        against = comparison(klds["amax"], values) if recipe != "amax" else ""
        print(f"{recipe:<30}{estimate(values)!s:>22}{median(values):>10.2e}{against}")
    print(f"{'step by step':<62}{COLUMNS}")
    for before, after in STEPS:
        print(f"{before + ' -> ' + after:<62}{comparison(klds[before], klds[after])}")


def comparison(before: Sequence[float], after: Sequence[float]) -> str:
    pairs = list(zip(before, after, strict=True))
    low, high = interval(before, after)
    p = sign_test(sum(b < a for a, b in pairs), sum(b > a for a, b in pairs))
    typical = exp(fmean(log(max(b, TINY) / max(a, TINY)) for a, b in pairs)) - 1
    return f"{change(before, after):>+9.1%}{low:>+8.1%} ..{high:>+7.1%}{p:>11.1g}{typical:>+9.1%}"


def change(plain: Sequence[float], values: Sequence[float]) -> float:
    """Relative change of the mean."""
    return sum(values) / sum(plain) - 1


def interval(plain: Sequence[float], values: Sequence[float]) -> Interval:
    """95 % interval of the change: percentiles over resampled examples, both recipes on the same ones."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.tensor([plain, values], dtype=torch.float64)
    draws = (torch.randint(len(plain), (len(plain),), generator=generator) for _ in range(RESAMPLES))
    changes = sorted(float(after / before - 1) for before, after in (sums[:, draw].sum(1) for draw in draws))
    return changes[round(0.025 * RESAMPLES)], changes[round(0.975 * RESAMPLES)]


if __name__ == "__main__":
    main()
