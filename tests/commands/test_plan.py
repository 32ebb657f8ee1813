"""Servers for a traffic: the arithmetic on figures whose law is known, and what is said where figures are missing."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from benchmarks import shapes
from transformers import DeepseekV3Config

from mixquant.bench.results import Engine, Results, Row, Times
from mixquant.checkpoint.locate import find
from mixquant.commands import plan as planning
from mixquant.commands.plan import BUSY, Traffic
from mixquant.errors import InputError
from mixquant.evaluate.results import Kernels
from mixquant.integrations.transformers.loading import cache_bytes, load_config
from tests.commandline import call, refuse, run

FIXED, EACH, PAIR = 5.0, 0.015, 2e-7
"""A prompt's milliseconds: fixed, for each new token, and for each pair of tokens."""
STEP = {1: 5.0, 8: 5.2, 32: 6.0, 128: 10.0}
TRAFFIC = Traffic(isl=8192, osl=256, turns=1, rate=20)


def prompt_ms(cached: int, new: int) -> float:
    return FIXED + EACH * new + PAIR * new * (cached + new / 2)


def row(workload: str, arm: str, cached: int, new: int, batch: int, first: float | None, step: float | None) -> Row:
    times = None if first is None else Times(p50=first, p99=1e6, low=first, high=1e6, n=7)
    return Row(
        workload=workload, case="", arm=arm, engine="vllm", model="demo", cached=cached, new=new, batch=batch,
        isl=cached + new if workload == "prompts" else 256, ms=[], ttft_ms=times, step_ms=step,
        kernels=Kernels(prefill=[], decode=[]), emulated=False,
    )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """As `mixquant bench` writes it: prompts of every arm take the same time here, and those at once are no guide."""
    lengths = [(0, 2048), (0, 8192), (0, 32768), (16384, 128), (16384, 512)]
    rows = [row("prompts", arm, *at, 1, prompt_ms(*at), None) for arm in ("uniform", "phase") for at in lengths]
    rows += [row("prompts", "uniform", 0, 2048, 16, 1e5, None)]
    rows += [row("decode", arm, 0, 0, batch, None, ms) for arm in ("bf16", "phase") for batch, ms in STEP.items()]
    rows += [row("decode", "bf16", 0, 8192, 32, None, 1e5)]  # beside somebody else's prompt
    engine = Engine.model_validate({"engine": "vllm", "tail": None, "rates": {"bandwidth": 4e12}})
    document = Results(
        model="demo", dummy=False, device="a GPU", versions={}, command="", arms=["bf16", "uniform", "phase"],
        rows=rows, engines={"bf16": engine}, workloads=[], ratios=[], missing={},
        notes=[],
    )  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(document.to_json())
    return path


def test_prefill_servers_follow_the_time_of_a_prompt(bench: Path) -> None:
    found = planning.plan("demo", [bench], TRAFFIC)
    takes = prompt_ms(0, 8192)
    assert found.prefill["prompt_ms"] == pytest.approx(takes, rel=1e-4)
    assert found.fit < 1e-4
    assert found.prefill["servers"] == 4  # 20 a second x 134.6 ms = 2.7 busy servers
    busy = 20 * takes / 1e3 / 4
    assert found.prefill["busy"] == pytest.approx(busy, rel=1e-4)
    assert found.prefill["wait_ms"] == pytest.approx(busy / (2 * (1 - busy)) * takes, rel=1e-4)
    assert busy <= BUSY


def test_decode_servers_follow_the_step_and_the_context(bench: Path) -> None:
    found = planning.plan("demo", [bench], TRAFFIC)
    per_token = cache_bytes(load_config(find("demo")))
    read = 1e3 * (8192 + 128 - 256) * per_token / 4e12
    assert found.decode["servers"] == 1  # 5,120 tokens a second, of which one server writes 12,800
    at_once = found.decode["at_once"]
    assert found.decode["step_ms"] == pytest.approx(1e3 * at_once / (20 * 256))  # Little's law
    assert 5 + read * at_once < found.decode["step_ms"] < 10 + read * at_once
    many = planning.plan("demo", [bench], replace(TRAFFIC, rate=200)).decode["servers"]
    assert many == math.ceil(200 * 256 * (10 + 128 * read) / 128 / 1e3 / BUSY)


def test_the_cache_bytes_of_a_token_are_those_of_the_model() -> None:
    """Keys and values of 16 bits; the shipped model has them in its configuration."""
    config = json.loads((find("demo").folder or Path()).joinpath("config.json").read_text())
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    known = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * size
    assert cache_bytes(load_config(find("demo"))) == known


def test_a_turn_brings_what_no_turn_before_it_brought() -> None:
    """Prompts of 1, 2 and 3 parts of 1,000 tokens, and answers of 100 between them: 2,100 on average."""
    turns = Traffic(isl=2100, osl=100, turns=3, rate=1)
    assert turns.new == round((1000 + 1100 + 1100) / 3)
    assert Traffic(isl=2100, osl=100, turns=3, rate=1, cache_hits=0.5).new == 1050
    assert Traffic(isl=2100, osl=100, turns=1, rate=1).new == 2100


def test_one_engine_for_both_stands_still_while_it_reads(bench: Path) -> None:
    one = planning.plan("demo", [bench], TRAFFIC).one_engine
    assert one is not None
    assert one["engines"] == 5
    assert one["reading"] == pytest.approx(20 * prompt_ms(0, 8192) / 1e3 / 5, rel=1e-4)
    assert one["gap_ms"] > 5 / (1 - one["reading"])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rate": 0.0}, "are above 0"),
        ({"rate": math.inf}, "are above 0"),
        ({"rate": math.nan}, "are above 0"),
        ({"rate": 1e308, "isl": 10**12}, "are above 0, and no more than 1e\\+12"),
        ({"isl": 10**13}, "no more than"),
        ({"cache_hits": 1.0}, "a share from 0 to below 1"),
        ({"osl": 5000, "turns": 10}, "cannot hold the answers of 10 turns"),
    ],
)
def test_a_traffic_that_cannot_be(bench: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        planning.plan("demo", [bench], replace(TRAFFIC, **changes))


def test_missing_figures_are_named_with_the_command_that_makes_them(bench: Path, tmp_path: Path) -> None:
    document = json.loads(bench.read_text())
    for arm, workload, complaint in (
        (
            "uniform",
            "prompts",
            "fewer than two lengths of prompts of the arm uniform: run `mixquant bench MODEL --arms",
        ),
        ("bf16", "decode", "no decode step of the arm bf16"),
    ):
        kept = [r for r in document["rows"] if (r["arm"], r["workload"]) != (arm, workload)]
        (tmp_path / "less.json").write_text(json.dumps(document | {"rows": kept}))
        with pytest.raises(InputError, match=complaint):
            planning.plan("demo", [tmp_path / "less.json"], TRAFFIC)
    (tmp_path / "other.json").write_text(json.dumps(document | {"device": "another GPU"}))
    with pytest.raises(InputError, match="are of several devices"):
        planning.plan("demo", [bench, tmp_path / "other.json"], TRAFFIC)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match="is not whole"):
        planning.plan("demo", [tmp_path / "other.json"], TRAFFIC)


def test_a_bench_with_arms_of_other_names(bench: Path) -> None:
    """vLLM's own FP8 has no rows here, and `phase` has both."""
    both = planning.plan("demo", [bench], TRAFFIC, ("phase", "phase", "phase"))
    assert both.prefill == planning.plan("demo", [bench], TRAFFIC).prefill
    with pytest.raises(InputError, match="prompts of the arm vllm:fp8"):
        planning.plan("demo", [bench], TRAFFIC, ("vllm:fp8", "bf16", "phase"))
    with pytest.raises(InputError, match="--arms names three"):
        planning.plan("demo", [bench], TRAFFIC, ("phase",))


def test_the_command(bench: Path) -> None:
    asked = ("plan", "demo", "--bench", bench, "--isl", "8k", "--osl", "256", "--rate", "20")
    said = run(*map(str, asked)).stdout
    assert "4 prefill: a prompt takes 135 ms" in said
    assert "or 5 engines that read and write" in said
    document = json.loads(run(*map(str, asked), "--json").stdout)
    assert (document["prefill"]["servers"], document["decode"]["servers"]) == (4, 1)
    for wrong in ("8kk", "inf", "nan", "1e400"):
        assert f"{wrong} is no number of tokens" in refuse(*map(str, asked), "--osl", wrong)


def test_the_example_of_the_page_is_what_the_command_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its model is on the hub; here a folder of the same shape stands for it."""
    shapes.write("8b", tmp_path)
    monkeypatch.chdir(Path(__file__).parents[2])
    page = Path("docs/plan.md").read_text(encoding="utf-8")
    command, printed = re.findall(r"^\$ mixquant (.*?)\n(\d.*?)^```", page, re.MULTILINE | re.DOTALL)[0]
    arguments = [
        str(tmp_path) if part == "Qwen/Qwen3-8B" else part for part in shlex.split(command.replace("\\\n", ""))
    ]
    assert call(*arguments).stdout.replace(str(tmp_path), "Qwen/Qwen3-8B") == printed


def test_latent_attention_keeps_one_vector_for_all_heads() -> None:
    config = DeepseekV3Config(num_hidden_layers=3, kv_lora_rank=512, qk_rope_head_dim=64, num_attention_heads=128)
    assert cache_bytes(config) == 2 * 3 * (512 + 64)
