"""What a report says: everything in its place, no time of an emulated arm, the same bytes for the same results."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant.report import render, write

from . import sample

RUN = "from mixquant.cli import main; main()"
MIXQUANT = [sys.executable, "-c", RUN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    sample.save(sample.results(limit=3), folder / "nvfp4.json")
    sample.save(sample.results(limit=3, emulated=False), folder / "fp8.json")
    sample.save(sample.bench(), folder / "bench.json")
    return folder


def text(folder: Path, *names: str, suffix: str = ".md") -> str:
    return render([folder / name for name in names], Path(f"report{suffix}")).decode()


def changed(folder: Path, name: str = "changed.json", **changes: Any) -> str:
    """The name of a results file in which some keys are other ones."""
    sample.save(sample.results(limit=3) | changes, folder / name)
    return name


def titles(document: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>|^## (.*)$", document, re.MULTILINE)


SECTIONS = [
    *("The arms", "Along the ladder", "Flips", "Distribution of the divergence", "Where the error grows", "By layer"),
    *("Kernels and machine", "How to reproduce"),
]


def test_html_and_markdown_have_the_same_sections_in_the_same_order(folder: Path) -> None:
    found = [[a or b for a, b in titles(text(folder, "nvfp4.json", suffix=suffix))] for suffix in (".html", ".md")]
    assert found == [SECTIONS, SECTIONS]


def test_the_figures_are_those_of_the_results(folder: Path) -> None:
    results = sample.results(limit=3)
    rows = {line.split(" | ")[0].strip("| "): line for line in text(folder, "nvfp4.json").splitlines()[::-1]}
    tags = {"bf16": "", "bf16-control": " (noise floor)"}
    for name, arm in results["arms"].items():
        row = rows[name + tags.get(name, " (emulated)")]
        assert f"{100 * arm['all']['accuracy']:.1f} ± {100 * arm['all']['se']:.1f} %" in row
    phase = results["arms"]["phase"]["divergence"]
    mantissa, exponent = f"{phase['kld_mean']:.1e}".split("e")
    shown = re.search(r"\((\S+) ± \S+\) × 10(\S+)", rows["phase (emulated)"])
    assert shown
    assert shown[1].startswith(mantissa)
    assert shown[2].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) == str(int(exponent))
    growth = phase["growth"]
    grown = f"| phase | {growth['ratio']:.2f} ± {growth['ratio_se']:.2f} | {growth['examples']} |"
    assert grown in text(folder, "nvfp4.json")


def test_flips_seeds_and_commands_are_shown(folder: Path) -> None:
    document = text(folder, "nvfp4.json")
    flips = sample.results(limit=3)["arms"]["uniform"]["all"]["flips"]
    assert f"| uniform | {flips['right_to_wrong']} | {flips['wrong_to_right']} | 126 |" in document
    assert "data seeds 100, 101, 102" in document
    assert "mixquant eval demo --arms bf16,bf16-control,uniform,phase,decode-only" in document
    assert "mixquant report nvfp4.json -o report.md" in document


@pytest.mark.parametrize("suffix", [".html", ".md", ".png"])
def test_the_same_results_give_the_same_bytes_in_another_process(folder: Path, suffix: str) -> None:
    output = folder / f"again{suffix}"
    command = [*MIXQUANT, "report", folder / "nvfp4.json", "-o", output]
    subprocess.run(command, check=True, env={"PYTHONHASHSEED": "7"})
    assert output.read_bytes() == render([folder / "nvfp4.json"], output)


def test_times_alone_change_nothing_and_figures_do(folder: Path) -> None:
    before = text(folder, changed(folder), suffix=".html")
    later = {"seconds": {"bf16": 1.0}, "total_seconds": 2.0, "started": "2032-01-01"}
    assert text(folder, changed(folder, time=later), suffix=".html") == before
    assert text(folder, changed(folder, margin=0.02), suffix=".html") != before


def test_an_emulated_arm_shows_no_time(folder: Path) -> None:
    document = text(folder, "nvfp4.json", "bench.json", suffix=".html")
    quality, _, _ = document.partition("Times of ")
    assert "12345" not in document  # seconds of an arm in the results
    assert "phase (emulated)" in quality
    assert "Divergence against speed" in quality
    assert "bf16&#39;s over the arm&#39;s" not in quality  # no chart
    for arm in ("uniform", "phase"):
        assert re.search(rf'{arm}\s*<span class="tag">emulated</span>', quality)


def test_control_a_native_arm_shows_its_times(folder: Path) -> None:
    document = text(folder, "fp8.json", "bench.json")
    assert "(emulated)" not in document
    assert "| phase | 8K | 1.35× |" in document  # 227.9 / 168.3
    assert "| phase | 16K + 512 | 0.9× |" in document  # 32.1 / 35.6: slower, and said


def test_times_of_other_kernels_are_not_an_arms_times(folder: Path) -> None:
    bench = sample.bench()
    for row in bench["rows"]:
        row["kernels"] = {"prefill": ["vllm.cutlass"], "decode": row["kernels"]["decode"]}
    sample.save(bench, folder / "other.json")
    document = text(folder, "fp8.json", "other.json")
    assert "phase (timed with other kernels: prefill vllm.cutlass, decode torch.linear)" in document
    assert "| phase | 8K |" not in document


def test_bench_files_stand_alone_and_rows_without_times_show_none(folder: Path) -> None:
    bench = sample.bench()
    bench["rows"] += [dict(row, arm="decode-only", ttft_ms=None, tpot_ms=None) for row in bench["rows"][:1]]
    sample.save(bench, folder / "untimed.json")
    document = text(folder, "untimed.json")
    assert "| decode-only | vllm | 2,048 | 0 | 1 | – | – | – | – |" in document
    assert "| bf16 | vllm | 2,048 | 0 | 1 | 53.1 | 56.3 | 1× | 5.10 |" in document


def test_two_models_are_told_apart(folder: Path) -> None:
    other = changed(folder, model={"name": "another-model", "hash": None}, command="mixquant eval another-model")
    document = text(folder, "nvfp4.json", other)
    assert "demo, nvfp4 prompts" in document
    assert "another-model, nvfp4 prompts" in document
    assert document.count("## The arms") == 2


def test_a_server_has_no_forced_figures_and_still_a_report(folder: Path) -> None:
    results = sample.results(limit=3)
    forced = [
        "kld_mean",
        "kld_se",
        "kld_median",
        "kld_p90",
        "kld_p99",
        "kld_p999",
        "kld_max",
        "same_top1",
        "same_top1_se",
    ]
    for arm in results["arms"].values():
        arm["kernels"] = {"prefill": [], "decode": []}
        if arm["divergence"]:
            arm["divergence"] |= dict.fromkeys(forced) | {"positions": 0, "quantiles": []}
            arm["divergence"] |= {"by_position": [], "by_context": []}
            arm["divergence"].pop("by_layer", None)
    sample.save(results, folder / "server.json")
    document = text(folder, "server.json")
    assert "Distribution of the divergence" not in document
    assert "Free run against bf16's" in document
    assert "Kernels of phase: not known" in document


def test_the_reference_alone_has_a_report(folder: Path) -> None:
    sample.save(sample.results(limit=3, arms=("bf16",)), folder / "alone.json")
    for suffix in (".html", ".md", ".png"):
        assert render([folder / "alone.json"], Path(f"report{suffix}"))


def test_divergence_of_zero_is_said_where_an_axis_cannot_show_it(folder: Path) -> None:
    results = sample.results(limit=3)
    control = results["arms"]["bf16-control"]["divergence"]
    control["by_position"] = [b | {"kld_mean": 0.0, "kld_se": 0.0} for b in control["by_position"]]
    sample.save(results, folder / "zero.json")
    document = text(folder, "zero.json", suffix=".html")
    assert "bf16-control: left out where the divergence is zero" in document
    assert "left out where" not in text(folder, "nvfp4.json", suffix=".html")


def test_words_of_a_file_stay_words(folder: Path) -> None:
    name = changed(folder, device="<script>alert(1)</script> | $x^2$", model={"name": "a&b", "hash": None})
    page, markdown = text(folder, name, suffix=".html"), text(folder, name)
    assert "<script" not in page
    assert html.escape("<script>alert(1)</script>") in page
    assert "a&amp;b" in page
    assert "<script" not in markdown
    assert "\\| $x^2$" in markdown


def test_png_is_an_image_of_the_charts(folder: Path) -> None:
    write([folder / "nvfp4.json"], folder / "report.png")
    header = (folder / "report.png").read_bytes()[:24]
    width, height = (int.from_bytes(header[at : at + 4]) for at in (16, 20))
    assert header.startswith(b"\x89PNG")
    assert width == 1600  # two charts of 400 units, doubled
    assert height > 5 * 2 * 262


def test_reporting_needs_no_framework(folder: Path) -> None:
    seen = "import atexit, sys; atexit.register(lambda: print({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    command = [sys.executable, "-c", f"{seen}; {RUN}", "report", folder / "nvfp4.json", "-o", folder / "quick.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert (folder / "quick.md").read_text(encoding="utf-8").startswith("# Quantizing the prompt")
