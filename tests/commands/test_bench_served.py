"""`mixquant bench --server`: vLLM's own benchmark on a real server, twice under two names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..commandline import call, refuse
from ..servers import Server, free_port


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "serve.json"
    path.write_text('{"workload": "serve", "input": 100, "output": 8, "requests": 3, "rounds": 1}')
    return path


def test_servers_take_turns(server: Server, workload: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench.json"
    done = call(
        "bench", "demo", "--server", f"bf16={server.url}", "--server", f"again={server.url}/v1", "--server",
        f"nobody=http://127.0.0.1:{free_port()}", "--workload", workload, "-o", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(output.read_text())
    assert [(row["arm"], row["engine"], row["isl"], row["batch"]) for row in document["rows"]] == [
        (arm, "vllm bench serve", 100, 3) for arm in ("bf16", "again")
    ]
    for row in document["rows"]:
        assert row["ttft_ms"]["n"] == 3
        assert 0 < row["ttft_ms"]["p50"] < row["ms"][0]
        assert row["tokens_per_s"] == pytest.approx(3 * 8 / row["ms"][0] * 1e3, rel=1e-4)
        assert row["step_ms"] > 0
    assert document["versions"]["vllm"]
    assert "no vLLM server answers at http://127.0.0.1" in document["missing"]["nobody"]
    assert call("report", output, "-o", tmp_path / "bench.md").returncode == 0
    assert "## Load on servers" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--server", "bf16=http://localhost:1"), "name --server and --workload serve"),
        (("--workload", "serve"), "name --server and --workload serve"),
        (("--workload", "serve", "--server", "phase=http://localhost:1"), "add --server bf16=URL"),
        (("--workload", "serve", "--server", "bf16=localhost"), "names no server"),
        (("--workload", "serve", *(2 * ("--server", "bf16=http://localhost:1"))), "has two servers"),
    ],
)
def test_refusals(options: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in refuse("bench", "demo", *options, "-o", tmp_path / "bench.json")
