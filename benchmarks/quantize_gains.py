"""What each step of `mixquant quantize` gains in a model's answers: KL divergence to BF16, recipe by recipe.

    python benchmarks/quantize_gains.py MODEL WORK [LIMIT [MOST]]     # prints the tables that benchmarks/results/ keeps

MODEL is quantized by every recipe, into WORK, and the folders stand side by side as arms of one evaluation on BFCL's
prompts of up to `MOST` tokens, `LIMIT` of a rung: as `phase` (prompts quantized) and as `uniform` (everything
quantized). All recipes are forced to BF16's own answers to the same examples, so they are compared example by example:
the relative change of the mean with a paired bootstrap's 95 % interval, and an exact sign test. `typical` is the same
change of the geometric mean, on which no single example weighs more than another. `calls` counts right answers, and
`names` those that name the right functions.

Recipes that fold, where a model's layers are proved to fold exactly, stand in an evaluation of their own: folding is
by powers of two, so their BF16 is the same model bit for bit, and writes the same answers. `text` calibrates on
Python's documentation, `bfcl` on questions of BFCL's other categories with their right calls, `agents` on the
transcripts that mixquant ships. `own-globals` gives each layer a global scale of its own, which engines that fuse q, k
and v cannot take: it shows what sharing them costs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import exp, log
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoTokenizer

import mixquant
from benchmarks.long_text import documentation
from mixquant.checkpoint.locate import find
from mixquant.devices import device_name, parse_device
from mixquant.evaluate.metrics import Interval, estimate
from mixquant.evaluate.significance import sign_test
from mixquant.offline.groups import PROVED
from mixquant.packages import folder as package_folder

RESAMPLES = 10_000
TINY = 1e-12  # nats, below what rounding leaves
OTHERS = ("parallel", "parallel_multiple", "live_parallel", "live_parallel_multiple")
"""BFCL's categories that are not asked here, so that calibration may read them."""

RECIPES: dict[str, dict[str, Any]] = {
    "amax": {"scales": "amax", "calibration": None},
    "search": {"calibration": None},
    "search-bfcl": {"gptq": False, "calibration": "bfcl.jsonl"},
    "search-agents": {"gptq": False},
    "gptq-bfcl": {"calibration": "bfcl.jsonl"},
    "gptq-text": {"calibration": "text.txt"},
    "gptq-agents": {},
    "gptq-bfcl-own-globals": {"calibration": "bfcl.jsonl"},
    "fold-search-bfcl": {"fold": True, "gptq": False, "calibration": "bfcl.jsonl"},
    "fold-gptq-bfcl": {"fold": True, "calibration": "bfcl.jsonl"},
}
STEPS = (
    ("amax", "search"),
    ("search", "search-bfcl"),
    ("search-bfcl", "gptq-bfcl"),
    ("gptq-bfcl", "gptq-text"),
    ("gptq-bfcl", "gptq-agents"),
    ("search-agents", "gptq-agents"),
    ("gptq-bfcl", "gptq-bfcl-own-globals"),
    ("gptq-bfcl", "fold-gptq-bfcl"),
    ("search-bfcl", "fold-search-bfcl"),
    ("fold-search-bfcl", "fold-gptq-bfcl"),
)
COLUMNS = f"{'change':>9}{'95 % interval':>18}{'sign test':>11}{'typical':>9}"
Figures = dict[str, list[dict[str, Any]]]
"""By recipe: one record of the journal an example, in the same order."""


def main() -> None:
    model, work, limit, most = sys.argv[1], Path(sys.argv[2]), *(sys.argv[3:] + ["50", "6000"][len(sys.argv) - 3 :])
    device, start = parse_device(None), time.perf_counter()
    work.mkdir(exist_ok=True)
    (work / "text.txt").write_text("\n\n".join(documentation()))
    (work / "bfcl.jsonl").write_text("\n".join(chats()))
    recipes = possible(find(model).decode)
    make = [("make", name) for name in recipes if not (work / name).exists()]
    with ThreadPoolExecutor(len(RECIPES) if device.type == "cuda" else 1) as pool:
        list(pool.map(lambda order: subprocess.run([sys.executable, __file__, model, work, *order], check=True), make))
    plain = [name for name in recipes if not RECIPES[name].get("fold")]
    klds: dict[str, Figures] = {"phase": {}, "uniform": {}}
    evaluate(model, work / "plain.json", (limit, most), {name: f"weights={work / name}" for name in plain}, klds)
    for name in set(recipes) - set(plain):
        evaluate(work / name, work / f"{name}.json", (limit, most), {name: ""}, klds)
    print(f"{model}, {device_name(device)}, torch {torch.__version__}; {len(klds['phase']['amax'])} examples of BFCL")
    for arm, figures in klds.items():
        show(f"{arm} arm", {name: figures[name] for name in recipes})
    print(f"\n{time.perf_counter() - start:.0f} s")


# ---------------------------------------------------------------------------------------------- measuring


def possible(model: str) -> list[str]:
    """The recipes that a model can go through: not all fold, and only chat models read the shipped transcripts."""
    folds = AutoConfig.from_pretrained(model).model_type in PROVED
    chats = AutoTokenizer.from_pretrained(model).chat_template is not None
    return [
        name
        for name, options in RECIPES.items()
        if (folds or not options.get("fold")) and (chats or "calibration" in options)
    ]


def quantize(model: str, work: Path, name: str) -> None:
    """Write the folder of one recipe."""
    options = dict(RECIPES[name])
    policy = {"prefill": "nvfp4", "scales": options.pop("scales", "search")}
    if file := options.get("calibration"):
        options["calibration"] = work / file
    fused = () if name.endswith("own-globals") else mixquant.layers.FUSED
    with mock.patch("mixquant.offline.groups.FUSED", fused):
        mixquant.quantize(model, policy, output=work / name, **options)


def chats() -> list[str]:
    """Documents of functions, a question, and its right calls, as texts for calibration."""
    data, found = package_folder("bfcl_eval") / "data", []
    for category in OTHERS:
        answers = lines(data / "possible_answer" / f"BFCL_v4_{category}.json")
        right = {row["id"]: row["ground_truth"] for row in answers}
        for row in lines(data / f"BFCL_v4_{category}.json"):
            asked = "\n".join(message["content"] for message in row["question"][0])
            functions = "\n".join(map(json.dumps, row["function"]))
            found.append(json.dumps({"text": f"{functions}\n\n{asked}\n\n{json.dumps(right.get(row['id'], []))}"}))
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def evaluate(
    model: str | Path, output: Path, prompts: tuple[str, str], arms: dict[str, str], klds: dict[str, Figures]
) -> None:
    """Run every recipe's two arms, and add its records. prompts: how many of a rung, and their longest in tokens; arms:
    where a recipe's weights are."""
    policies = {"phase": "nvfp4", "uniform": "prefill=nvfp4,decode=nvfp4"}
    own = [
        f"--arm={name}.{arm}={','.join(filter(None, [policy, weights]))}"
        for name, weights in arms.items()
        for arm, policy in policies.items()
    ]
    command = ["eval", str(model), "--arms", "bf16", *own, "--tasks", "bfcl", "-o", str(output)]
    few = AutoConfig.from_pretrained(model).vocab_size < 100_000  # else the kept logits of an answer take tens of GiB
    size = "128" if few and parse_device(None).type == "cuda" else "32"
    more = ["--limit", prompts[0], "--max-prompt-tokens", prompts[1], "--batch-size", size]
    program = "from mixquant.cli import main; main()"
    subprocess.run([sys.executable, "-c", program, *command, *more], stdout=sys.stderr, check=True)
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    records = sorted((row for row in rows if "arm" in row), key=lambda r: (r["task"], r["rung"], r["seed"], r["index"]))
    for name in arms:
        for arm in policies:
            klds[arm][name] = [row for row in records if row["arm"] == f"{name}.{arm}"]


# ---------------------------------------------------------------------------------------------- comparing


def show(title: str, figures: Figures) -> None:
    klds = {name: [fmean(row["kld"]) for row in rows if row["kld"]] for name, rows in figures.items()}
    print(f"\n{title:<24}{'mean KLD':>22}{'median':>10}{'calls':>7}{'names':>7}{COLUMNS}")
    for name, values in klds.items():
        right = f"{count(figures[name], 'right'):>7}{count(figures[name], 'nearly'):>7}"
        against = comparison(klds["amax"], values) if name != "amax" else ""
        print(f"{name:<24}{estimate(values)!s:>22}{median(values):>10.2e}{right}{against}")
    print(f"{'step by step':<70}{COLUMNS}")
    for before, after in (step for step in STEPS if step[0] in klds and step[1] in klds):
        print(f"{before + ' -> ' + after:<70}{comparison(klds[before], klds[after])}")


def count(rows: Iterable[dict[str, Any]], key: str) -> int:
    return sum(bool(row[key]) for row in rows)


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
    if sys.argv[3:4] == ["make"]:
        quantize(sys.argv[1], Path(sys.argv[2]), sys.argv[4])
    else:
        main()
