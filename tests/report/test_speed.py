"""What a report says of a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixquant.bench.results import read
from mixquant.report import build, render
from mixquant.report.page import Curves

from ..bench import sample as bench
from . import sample


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    path.write_text(bench.results().to_json())
    return path


@pytest.fixture(scope="module")
def markdown(file: Path) -> str:
    return render([file], Path("report.md")).decode()


def charts(file: Path) -> dict[str, Curves]:
    page = build.page({file: read(file)}, "report.md")
    found = [chart for row in page.rows for chart in row.charts]
    assert all(isinstance(chart, Curves) for chart in found)
    return {chart.title: chart for chart in found if isinstance(chart, Curves)}


def test_the_sentence_says_each_arms_time_over_bf16s(markdown: str) -> None:
    assert "vllm:fp8 agent 0.68, prompts 0.68, decode 0.68" in markdown
    assert "nvfp4 agent" not in markdown  # emulated: it has no time


def test_figures_and_what_did_not_run(markdown: str) -> None:
    assert "| 8,192 tokens | 220.0 | 150.0 (0.68, 0.68 to 0.68) | 165.0 (0.75, 0.75 to 0.75) | emulated |" in markdown
    assert "gone did not run: no such kernel" in markdown
    assert "8b, dummy weights" in markdown or "with dummy weights" in markdown
    assert "graphs FULL\\_AND\\_PIECEWISE, runner V2, attention FLASH\\_ATTN" in markdown


def test_the_agents_table(markdown: str) -> None:
    line = next(line for line in markdown.splitlines() if line.startswith("| phase | 0.17"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["0.17", "0.75"]
    assert "91.0 %" in line


def test_the_ceiling_and_the_share_that_is_reached(markdown: str) -> None:
    assert "| 8,192 tokens | 100.0 (45.5 %) | 100.0 (66.7 %) | 100.0 (60.6 %) | – |" in markdown
    assert "| 16 conversations of 8 turns | 100.0 (45.5 %) | 100.0 (66.7 %) | 100.0 (60.6 %) | – |" in markdown


def test_a_prompt_beside_a_decode_step(markdown: str) -> None:
    table = markdown[markdown.index("First token of the prompt that is read meanwhile") :]
    assert "| a step at batch 8 while 512 tokens are read | 55.0 | 37.5 | 41.2 | – |" in table[: table.index("## ")]


def test_curves_over_length_batch_and_tail(file: Path) -> None:
    drawn = charts(file)
    assert set(drawn) >= {"Prompts alone", "Short turns", "A step by its batch"}
    alone = {line.arm: line for line in drawn["Prompts alone"].lines}
    assert set(alone) == {"vllm:fp8", "phase", "tail0", "tail64"}
    assert [words for _, words in drawn["Prompts alone"].x.ticks] == ["2K", "8K"]
    assert alone["phase"].points[1].y == pytest.approx(0.75)
    (tails,) = [chart for title, chart in drawn.items() if title.startswith("What a tail costs")]
    line = next(line for line in tails.lines if line.arm == "8K")
    assert [point.y for point in line.points] == pytest.approx([160 / 220, 165 / 220, 170 / 220], rel=1e-5)
    assert [words for _, words in tails.x.ticks] == ["0", "1", "64"]
    assert {line.arm for line in tails.lines} == {"2K", "8K", "512 on 16K", "1K on 16K"}


def test_the_committed_report_is_that_of_the_committed_results() -> None:
    folder = Path(__file__).parents[2] / "benchmarks/results"
    report = folder / "bench-8b-h200.md"
    inputs = [folder / f"bench-8b-h200{part}.json" for part in ("", "-agent", "-short", "-tails")]
    assert render(inputs, report) == report.read_bytes()


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_it_is_drawn_and_twice_the_same(file: Path, suffix: str) -> None:
    one, two = (render([file], Path(f"report{suffix}")) for _ in range(2))
    assert one == two
    assert len(one) > 10_000


def test_it_stands_beside_an_evaluation(file: Path, tmp_path: Path) -> None:
    sample.save(sample.results(limit=3), tmp_path / "eval.json")
    both = render([tmp_path / "eval.json", file], Path("report.md")).decode()
    assert "# demo, nvfp4" in both
    assert "# 8b with dummy weights: how fast" in both
