"""Results of a benchmark that look like a GPU's: two stock arms, ours with three tails, one that is emulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixquant.bench.results import Engine, Results, Row, ratios, times

KERNELS = {"prefill": ["vllm.cutlass_fp8"], "decode": ["vllm.bf16"]}
ARMS = {"bf16": 220.0, "vllm:fp8": 150.0, "phase": 165.0, "nvfp4": None, "tail0": 160.0, "tail64": 170.0}
TAILS = {"phase": 1, "tail0": 0, "tail64": 64}


def row(
    arm: str,
    ms: Sequence[float],
    case: str = "8,192 tokens",
    workload: str = "prompts",
    isl: int = 8192,
    cached: int = 0,
    batch: int = 1,
    **more: Any,
) -> Row:
    fields: dict[str, Any] = {
        "workload": workload, "case": case, "arm": arm, "engine": "vllm", "model": "8b", "isl": isl, "cached": cached,
        "new": 0 if workload == "decode" else isl - cached, "batch": batch, "ms": [float(value) for value in ms],
        "ttft_ms": times([float(value) for value in ms]), "step_ms": None, "kernels": KERNELS, "emulated": not ms,
    }  # fmt: skip
    return Row.model_validate(fields | more)


def turns(middle: float | None) -> list[float]:
    return [] if middle is None else [middle * 0.98, middle, middle * 1.03]


def results() -> Results:
    rows = []
    for arm, ms in ARMS.items():
        short = None if ms is None else ms / 4
        ceiling = {} if ms is None else {"ceiling_ms": 100.0, "ceiling_share": 100 / ms}
        rows += [
            row(arm, turns(short), case="2,048 tokens", isl=2048),
            row(arm, turns(ms), **ceiling),
            row(arm, turns(short), case="512 tokens on 16,384 cached", isl=16896, cached=16384),
            row(arm, turns(short), case="1,024 tokens on 16,384 cached", isl=17408, cached=16384),
            row(arm, turns(short), "a step at batch 1", "decode", isl=256, step_ms=short),
            row(arm, turns(short), "a step at batch 8", "decode", isl=256, batch=8, step_ms=short),
            row(arm, turns(short), "a step at batch 8 while 512 tokens are read", "decode", isl=256, batch=8, new=512),
            row(
                arm, turns(ms), "16 conversations of 8 turns", "agent", isl=16384, batch=16, hit_rate=0.91,
                later_ttft_ms=times(turns(short)), tokens_per_s=900.0, step_ms=9.0, **ceiling,
            ),
        ]  # fmt: skip
    order = list(dict.fromkeys((found.workload, found.case) for found in rows))
    rows.sort(key=lambda found: order.index((found.workload, found.case)))
    facts = {"graphs": "FULL_AND_PIECEWISE", "runner": "V2", "attention": ["FLASH_ATTN"], "model_bytes": 16 * 10**9}
    engines = {
        arm: Engine.model_validate(
            {"engine": "vllm with mixquant" if arm in TAILS else f"vllm {arm}", "tail": TAILS.get(arm)} | facts
        )
        for arm in ARMS
    }
    return Results(
        model="8b",
        dummy=True,
        device="NVIDIA H200",
        versions={"vllm": "0.26.0"},
        command="mixquant bench 8b -o bench.json",
        started=1795970000.0,
        seconds=200.0,
        arms=[*ARMS, "gone"],
        engines=engines,
        workloads=[{"workload": "prompts"}],
        rows=rows,
        ratios=ratios(rows),
        missing={"gone": "no such kernel"},
        notes=["Left out prompts, 131,072 tokens."],
    )
