"""`mixquant bench --engine transformers` with the demo model, on a machine that has no vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant.policy import TAIL

from ..commandline import refuse
from .benches import Measured, write

WORKLOADS: dict[str, dict[str, Any]] = {
    "prompts": {"alone": [64], "together": [48], "requests": 3, "cached": [256], "new": [40], "rounds": 2},
    "decode": {"batches": [1, 3], "behind": 20, "steps": 6, "reading": 64, "neighbours": [2], "rounds": 2},
}
WITHOUT_VLLM = "import sys; sys.modules['vllm'] = None; from mixquant.cli import main; main(sys.argv[1:])"


def run(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp("bench")
    write(folder, WORKLOADS)
    command = [
        sys.executable, "-c", WITHOUT_VLLM, "bench", "demo", "--engine", "transformers", "--prefill", "int8", "--arm",
        "tail4=int8,tail=4", "--arm", "nested=fp8,storage=nested", "--arm", "native=nvfp4,native=true", "--workload",
        "prompts.json,decode.json", "-o", "bench.json",
    ]  # fmt: skip
    done = run(folder, command)
    return Measured(folder, command, done.stdout, done.stderr)


def test_every_arm_has_a_row_in_every_case(measured: Measured) -> None:
    document = measured.document
    found = {(row["workload"], row["case"], row["arm"]) for row in document["rows"]}
    cases = {(workload, case) for workload, case, _ in found}
    assert found == {(*case, arm) for case in cases for arm in ("bf16", "uniform", "phase", "tail4", "nested")}
    assert len(cases) == 3 + 2
    assert list(document["missing"]) == ["native"]
    assert measured.stdout.startswith(f"demo on CPU ({document['device'][5:-1]}), Transformers ")


def test_rows_say_their_engine_and_kernels(measured: Measured) -> None:
    document = measured.document
    assert {row["engine"] for row in document["rows"]} == {"transformers"}
    engines = document["engines"]
    assert engines["bf16"]["engine"] == "transformers"
    assert engines["bf16"]["kernels"] == {"prefill": ["torch.nn.Linear"], "decode": ["torch.nn.Linear"]}
    assert engines["phase"]["engine"] == engines["tail4"]["engine"] != engines["uniform"]["engine"]
    assert (engines["phase"]["tail"], engines["tail4"]["tail"], engines["bf16"]["tail"]) == (TAIL, 4, None)
    phase, uniform = engines["phase"]["kernels"], engines["uniform"]["kernels"]
    assert phase["prefill"] == uniform["prefill"] == uniform["decode"] != phase["decode"]
    assert {engine["graphs"] for engine in engines.values()} == {"NONE"}
    assert engines["nested"]["model_bytes"] < engines["bf16"]["model_bytes"] < engines["phase"]["model_bytes"]


def test_times_are_of_arms_that_are_not_emulated(measured: Measured) -> None:
    emulated = {row["arm"] for row in measured.document["rows"] if row["emulated"]}
    assert "nested" in emulated
    assert "bf16" not in emulated
    for row in measured.document["rows"]:
        assert len(row["ms"]) == (0 if row["emulated"] else 2)
        assert all(ms > 0 for ms in row["ms"])
    for row in measured.rows("prompts"):
        assert row["emulated"] or row["ttft_ms"]["n"] == 2 * row["batch"]
        assert row["emulated"] or row["hit_rate"] == pytest.approx(row["cached"] / row["isl"], abs=1e-4)
    for row in measured.rows("decode"):
        assert row["emulated"] or row["step_ms"] > 0


def test_a_step_beside_a_prompt_is_left_out_and_said(measured: Measured) -> None:
    (note,) = measured.document["notes"]
    assert note.startswith("Left out decode, a step at batch 2 while 64 tokens are read: ")
    assert note in measured.stderr


def test_the_same_command_again_loads_no_model(measured: Measured) -> None:
    before = measured.document
    done = run(measured.folder, measured.command)
    assert "starting" not in done.stderr
    assert "starting" in measured.stderr
    assert measured.document["rows"] == before["rows"]


def test_the_report_draws_it(measured: Measured) -> None:
    run(measured.folder, [sys.executable, "-m", "mixquant", "report", "bench.json", "-o", "bench.md"])
    page = (measured.folder / "bench.md").read_text()
    assert f"Transformers {measured.document['versions']['transformers']} on CPU" in page
    assert "graphs NONE, attention sdpa" in page


@pytest.mark.slow
def test_made_up_weights(tmp_path: Path) -> None:
    (tmp_path / "short.json").write_text('{"workload": "decode", "batches": [1], "steps": 2, "reading": 0}')
    command = [
        sys.executable, "-m", "mixquant", "bench", "demo", "--engine", "transformers", "--prefill", "int8", "--arms",
        "bf16,phase", "--workload", "short.json", "--rounds", "1", "--load-format", "dummy", "-o", "bench.json",
    ]  # fmt: skip
    done = run(tmp_path, command)
    assert done.stdout.startswith("demo, dummy weights on CPU")
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 2


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bench", "demo", "-o", tmp_path / "bench.json", "--prefill", "int8"]
    here = [*command, "--engine", "transformers"]
    assert "Transformers runs the workloads prompts and decode" in refuse(*here, "--workload", "prompts,agent")
    assert "vllm:fp8 is an arm of vLLM" in refuse(*here, "--arms", "bf16,vllm:fp8")
    served = [*here, "--workload", "serve", "--server", "bf16=http://localhost:1"]
    assert "Transformers runs the workloads prompts and decode" in refuse(*served)
    assert "did you mean transformers" in refuse(*command, "--engine", "transformer")
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert "vLLM is not installed: pip install" in refuse(*command)
    assert list(tmp_path.iterdir()) == []
