"""A run that looks like a real one: synthetic records, seeded, through the evaluator's own `summarize`.

uniform loses answers and drifts while it writes; phase starts a little off and recovers; the control hardly moves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from mixquant.evaluate.records import Record
from mixquant.evaluate.summary import summarize


class Behaviour(NamedTuple):
    """kld: median nats a token; drift: exponent of its growth along the answer; shift: points of accuracy lost."""

    kld: float
    drift: float
    shift: float
    spread: float


ARMS = {
    "bf16": None,
    "bf16-control": Behaviour(2e-9, 0.0, 0.0, 0.002),
    "uniform": Behaviour(4e-4, 0.35, 0.045, 0.05),
    "phase": Behaviour(4e-5, -0.3, 0.001, 0.02),
    "decode-only": Behaviour(3e-4, 0.35, 0.035, 0.05),
}
LADDERS = {
    "arithmetic": [(0.999, 310), (0.97, 620), (0.88, 900), (0.54, 1240)],
    "lookup": [(0.999, 330), (0.998, 640), (0.97, 910), (0.41, 1390)],
    "retrieval": [(0.98, 1024), (0.86, 2048)],
    "toolcall": [(0.999, 350), (0.99, 660), (0.84, 930), (0.5, 1330)],
}
SEEDS = (100, 101, 102)
NATIVE = {"prefill": ["torch.scaled_mm.fp8"], "decode": ["torch.linear"]}
EMULATED = {"prefill": ["emulation.nvfp4"], "decode": ["torch.linear"]}


def results(
    limit: int = 20, emulated: bool = True, arms: tuple[str, ...] = tuple(ARMS), **changes: Any
) -> dict[str, Any]:
    """A results document of `limit` examples a rung and seed; changes replace what is known before the run."""
    run: dict[str, Any] = {
        "model": {"name": "demo", "hash": "6b1f0c2d9a" * 6},
        "engine": "transformers",
        "device": "a synthetic machine of two cores",
        "versions": {"torch": "2.13.0", "transformers": "5.19.0"},
        "threads": 1,
        "command": f"mixquant eval demo --arms {','.join(arms)} --tasks agent,retrieval --seeds 3 -o results.json",
        "format": "nvfp4" if emulated else "fp8",
        "tail": 1,
        "seeds": list(SEEDS),
        "limit": limit,
        "suites": ["agent", "retrieval"],
        "arms": {arm: _facts(arm, emulated) for arm in arms},
        "time": {"seconds": dict.fromkeys(arms, 12345.6), "total_seconds": 98765.4, "started": 1935903600.0},
    }
    return summarize(
        _records(limit, arms), run | changes, lambda example: f"What is {example[0]} {example[-1]}?"
    ).to_dict()


POLICIES = {
    "bf16": {"prefill": "bf16", "decode": "bf16", "tail": 1},
    "bf16-control": {"prefill": "bf16", "decode": "bf16", "tail": 1},
    "uniform": {"prefill": "nvfp4", "decode": "nvfp4", "tail": 1},
    "phase": {"prefill": "nvfp4", "decode": "bf16", "tail": 1},
    "decode-only": {"prefill": "bf16", "decode": "nvfp4", "tail": 1},
    "tail16": {"prefill": "nvfp4", "decode": "bf16", "tail": 16},
    "tail128": {"prefill": "nvfp4", "decode": "bf16", "tail": 128},
    "<b>": {"prefill": "nvfp4", "decode": "bf16", "tail": 64, "weights": "some/folder"},
    "phase-control": {"prefill": "nvfp4", "decode": "bf16", "tail": 1},
}


def asked_results(limit: int = 3) -> dict[str, Any]:
    """A run with arms of any policy, an easier reading of its answers, and a second draw of phase's error."""
    made = [replace(record, nearly=True) for record in _records(limit, tuple(ARMS))]
    for record in [record for record in made if record.arm == "phase"]:
        assert record.kld
        made += [replace(record, arm=arm, kld=[x * y for x in record.kld]) for arm, y in _FURTHER.items()]
        made.append(replace(record, arm="phase-control", redraw=[x / 2 for x in record.kld]))
    run: dict[str, Any] = {
        "model": {"name": "demo", "hash": None}, "engine": "transformers", "device": "a synthetic machine",
        "versions": {"torch": "2.13.0"}, "threads": 1, "command": "mixquant eval demo", "format": "nvfp4", "tail": 1,
        "seeds": list(SEEDS), "limit": limit, "suites": ["agent"],
        "arms": {arm: _facts("phase" if arm in _FURTHER else arm, True) | {"policy": p} for arm, p in POLICIES.items()},
    }  # fmt: skip
    return summarize(made, run).to_dict()


_FURTHER = {"tail16": 0.7, "tail128": 0.5, "<b>": 0.6}


def save(document: Any, path: Path) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def _facts(arm: str, emulated: bool) -> dict[str, Any]:
    runs = emulated and not arm.startswith("bf16")
    facts: dict[str, Any] = {"emulated": runs, "kernels": _kernels(arm, EMULATED if emulated else NATIVE)}
    if arm in ("uniform", "phase"):
        facts["by_layer"] = [
            {
                "layer": f"model.layers.{i}",
                "kld_mean": (3e-5 if arm == "uniform" else 1e-5) * (1 + (i - 3) ** 2),
                "kld_se": 2e-6,
                "sqnr_db": 20.0 + i,
            }
            for i in range(8)
        ]
    return facts


def _kernels(arm: str, quantized: dict[str, list[str]]) -> dict[str, list[str]]:
    fast, precise = quantized["prefill"], quantized["decode"]
    prefill = precise if arm in ("bf16", "bf16-control", "decode-only") else fast
    return {"prefill": prefill, "decode": fast if arm in ("uniform", "decode-only") else precise}


def _records(limit: int, arms: tuple[str, ...]) -> Iterator[Record]:
    for task, ladder in LADDERS.items():
        for rung, (accuracy, tokens) in enumerate(ladder):
            for seed in SEEDS:
                for index in range(limit):
                    example = {"task": task, "rung": rung, "seed": seed, "index": index, "label": f"{tokens} tokens"}
                    yield from _answers(example, accuracy, tokens, arms)


def _answers(example: dict[str, Any], accuracy: float, tokens: int, arms: tuple[str, ...]) -> Iterator[Record]:
    """One example's record in every arm."""
    random = Random(json.dumps(example))
    ease, length = random.random(), random.randint(12, 90)
    prompt = tokens + random.randint(-20, 20)
    reference = [random.randint(5, 500) for _ in range(length)]
    for arm in arms:
        behaviour = ARMS.get(arm)
        if behaviour is None:
            right, kld, flips = ease < accuracy, None, None
        else:
            hardness = 20 * (1.02 - accuracy)
            kld = [
                behaviour.kld * hardness * (1 + i) ** behaviour.drift * random.lognormvariate(0, 2.2)
                for i in range(length)
            ]
            flips = [i for i, nats in enumerate(kld) if nats > 0.05 * random.random() + 0.01]
            right = ease + random.gauss(behaviour.shift * min(1.0, hardness / 2), behaviour.spread) < accuracy
        answer = reference[: flips[0]] + [1] * (length - flips[0]) if flips else reference
        yield Record(
            arm=arm,
            **example,
            prompt_tokens=prompt,
            right=right,
            answer=answer,
            text=f"{arm} says {len(answer)}",
            kld=kld,
            flips=flips,
        )
