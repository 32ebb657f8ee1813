"""What `benchmarks/pair.sh` says of its figures, as far as no GPU is needed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.pair import FORMAT, PREFILL, SIZES, Bench, Load, quantiles, write_model
from benchmarks.pair_report import tables

from mixquant.checkpoint.locate import find
from mixquant.integrations.vllm.pair import prefill_policy
from mixquant.policy import Policy


def load(arm: str, first: list[float], gaps: list[float], **more: Any) -> dict[str, Any]:
    figures = {"first_ms": quantiles(first), "gap_ms": quantiles(gaps)}
    return {"kind": "load", "arm": arm, "load": "8192 + 256 tokens, 4/s", **figures, **more}


def test_a_pair_is_compared_with_two_engines_load_by_load() -> None:
    rows = [
        load("pair", [0.3, 0.4], [0.005] * 99 + [0.01], transfer_ms=10.0, transfer_mb=1200.0),
        load("2 x mixquant", [0.2, 0.2], [0.005] * 99 + [0.2]),
        {"kind": "same", "prompt": 65, "of": 8, "equal": {"pair": 8}},
    ]
    text = "\n".join(tables({"machine": "2 x GPU", "failed": {"bf16-0": "no memory"}}, rows))
    assert "| first token: 8192 + 256 tokens, 4/s | 350.0 / 400.0 / 400.0 | 200.0 / 200.0 / 200.0 |" in text
    assert "| tokens a second of one answer: 8192 + 256 tokens, 4/s | 198 | 144 |" in text
    assert (
        "a pair takes 1.75 times 2 x mixquant's first token (99th percentile: 2.00) and 1.00 times its gap (0.05)"
        in text
    )
    assert "x 2 x BF16" not in text
    assert "1200 MB by NIXL in 10.0 ms (120 GB/s)" in text
    assert "failed: bf16-0: no memory" in text


def test_what_was_not_measured_is_no_figure() -> None:
    assert quantiles([]) == {}
    rows = [load("pair", [], []), load("2 x BF16", [0.1], [0.1])]
    assert "| first token: 8192 + 256 tokens, 4/s | – | 100.0 / 100.0 / 100.0 |" in tables(
        {"machine": "m", "failed": {}}, rows
    )


def test_the_model_is_one_that_a_pair_finds(tmp_path: Path) -> None:
    """Of Qwen3-8B's shape, without weights."""
    found = find(write_model(tmp_path / "model"))
    assert found.folder is not None
    assert json.loads((found.folder / "config.json").read_text())["num_hidden_layers"] == 36
    assert found.decode == str(found.folder)


def test_the_prefill_server_is_one_of_a_pair() -> None:
    """On every GPU, also where a policy that does not say its storage nests."""
    asked = dict(PREFILL["hf_overrides"]["quantization_config"])
    assert asked.pop("quant_method") == "mixquant"
    assert Policy.parse(asked) == prefill_policy({"prefill": FORMAT}, find("demo"))


def test_long_answers_end_where_a_load_fails() -> None:
    """Else they would be written on beside the rows that follow."""
    ended: list[int] = []

    class Failing(Bench):
        def __init__(self) -> None:
            self.size = SIZES["demo"]

        async def request(self, arm: str, number: int, *asked: Any) -> Any:
            if not isinstance(asked[-1], asyncio.Event):
                raise RuntimeError("an engine ended")
            await asked[-1].wait()
            ended.append(number)

    async def run() -> None:
        with pytest.raises(RuntimeError, match="an engine ended"):
            await Failing()._load("2 x BF16", Load(prompt=9, answer=4, rate=50, writing=2))
        await asyncio.sleep(0)

    asyncio.run(run())
    assert sorted(ended) == [0, 1]
