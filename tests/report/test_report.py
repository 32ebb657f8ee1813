"""What a report says: everything in its place, no time of an emulated arm, the same bytes for the same results."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mixquant
from mixquant.evaluate.reading import read
from mixquant.report import accuracy, charts, palette, render

from ..evaluate import synthetic
from . import sample
from .rendering import curves, text

RUN = "from mixquant.cli import main; main()"
MIXQUANT = [sys.executable, "-c", RUN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    sample.save(sample.results(limit=3), folder / "nvfp4.json")
    sample.save(sample.results(limit=3, emulated=False), folder / "fp8.json")
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    """The unchanged results as HTML, which takes a second to draw."""
    return text(folder, "nvfp4.json", suffix=".html")


@pytest.fixture(scope="module")
def picture(folder: Path) -> bytes:
    """The same as PNG."""
    return render([folder / "nvfp4.json"], Path("report.png"))


def changed(folder: Path, name: str = "changed.json", **changes: Any) -> str:
    """The name of a results file in which some keys are other ones."""
    sample.save(sample.results(limit=3) | changes, folder / name)
    return name


@pytest.mark.parametrize("suffix", [".md", ".html"])
def test_the_commit_stands_beside_version_date_and_duration(folder: Path, suffix: str) -> None:
    found = text(folder, changed(folder, commit="9d7b0ea-dirty"), suffix=suffix)
    assert f"mixquant {mixquant.__version__}, commit 9d7b0ea-dirty, 2031-05-" in found
    assert found.count("9d7b0ea-dirty") == 2  # and once among the machine's facts, with the duration
    assert "commit" not in text(folder, "nvfp4.json", suffix=suffix)


def titles(document: str) -> list[str]:
    return re.findall(r"<h2[^>]*>(.*?)</h2>|^## (.*)$", document, re.MULTILINE)


SECTIONS = [
    *("The arms", "Along the ladder", "Flips", "Distribution of the divergence", "Where the error grows", "By layer"),
    *("Kernels and machine", "How to reproduce"),
]


def test_html_and_markdown_have_the_same_sections_in_the_same_order(folder: Path, page: str) -> None:
    found = [[a or b for a, b in titles(document)] for document in (page, text(folder, "nvfp4.json"))]
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
    grown = f"| phase | {growth['ratio']:.2f} ± {growth['ratio_se']:.2f} | {100 * growth['rises']:.1f} % | "
    assert grown in text(folder, "nvfp4.json")


def test_flips_seeds_and_commands_are_shown(folder: Path) -> None:
    document = text(folder, "nvfp4.json")
    flips = sample.results(limit=3)["arms"]["uniform"]["all"]["flips"]
    assert f"| uniform | {flips['right_to_wrong']} | {flips['wrong_to_right']} | 126 |" in document
    assert "data seeds 100, 101, 102" in document
    assert "mixquant eval demo --arms bf16,bf16-control,uniform,phase,decode-only" in document
    assert "mixquant report nvfp4.json -o report.md" in document


@pytest.mark.parametrize("suffix", [".html", ".md", ".png"])
def test_the_same_results_give_the_same_bytes_in_another_process(
    folder: Path, page: str, picture: bytes, suffix: str
) -> None:
    output = folder / f"report{suffix}"
    command = [*MIXQUANT, "report", folder / "nvfp4.json", "-o", output]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"})
    here = {".html": page.encode(), ".md": text(folder, "nvfp4.json").encode(), ".png": picture}
    assert output.read_bytes() == here[suffix]


def test_times_change_only_date_and_duration(folder: Path) -> None:
    before = text(folder, changed(folder))
    later = {"seconds": {"bf16": 1.0}, "total_seconds": 2.0, "started": 1967439600.0}
    after = text(folder, changed(folder, time=later))
    told = [("27 h 26 min", "2 s"), ("2031-05-07 07:00 UTC", "2032-05-06 07:00 UTC")]
    for old, new in told:
        assert old in before
        before = before.replace(old, new)
    assert after == before


def test_control_another_margin_is_drawn(folder: Path, page: str) -> None:
    other = text(folder, changed(folder, margin=0.02), suffix=".html")
    assert ["margin ± 2<" in document for document in (page, other)] == [False, True]


def test_no_arm_shows_a_time(folder: Path, page: str) -> None:
    assert "12345" not in page  # seconds of an arm
    for arm in ("uniform", "phase"):
        assert re.search(rf'{arm}\s*<span class="tag">emulated</span>', page)
    assert "(emulated)" not in text(folder, "fp8.json")


def test_two_models_are_told_apart(folder: Path) -> None:
    other = changed(folder, model={"name": "another-model", "hash": None}, command="mixquant eval another-model")
    document = text(folder, "nvfp4.json", other)
    assert re.findall("^# .*", document, re.MULTILINE) == [
        f"# {name}, nvfp4: 14 rungs of 293 to 2,064 prompt tokens" for name in ("demo", "another-model")
    ]
    assert document.count("## The arms") == 2


def test_two_verdicts_of_one_model_are_told_apart_by_their_rungs_or_else_by_their_files(folder: Path) -> None:
    short = changed(folder, prompt_tokens={"min": 293, "median": 500.0, "max": 640})
    headings = re.findall("^# .*", text(folder, "nvfp4.json", short), re.MULTILINE)
    assert headings == [f"# demo, nvfp4: 14 rungs of 293 to {most} prompt tokens" for most in ("2,064", "640")]
    headings = re.findall("^# .*", text(folder, "nvfp4.json", changed(folder, tail=2)), re.MULTILINE)
    assert [heading.rpartition(" ")[2] for heading in headings] == ["(nvfp4.json)", "(changed.json)"]


def test_contents_link_to_every_heading(folder: Path) -> None:
    """As GitHub names them: a second heading of the same words gets -1."""
    document = text(folder, "nvfp4.json", changed(folder, model={"name": "other", "hash": None}))
    contents, _, rest = document.partition("\n\n")
    links = re.findall(r"\(#([^)]*)\)", contents)
    assert len(links) == len(re.findall("^##? ", rest, re.MULTILINE)) == 2 * 9
    assert len(set(links)) == len(links)
    assert links[0] == "demo-nvfp4-14-rungs-of-293-to-2064-prompt-tokens"
    assert {"the-arms", "the-arms-1"} < set(links)


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


def test_divergence_of_zero_is_said_where_an_axis_cannot_show_it(folder: Path, page: str) -> None:
    results = sample.results(limit=3)
    control = results["arms"]["bf16-control"]["divergence"]
    control["by_position"] = [b | {"kld_mean": 0.0, "kld_se": 0.0} for b in control["by_position"]]
    sample.save(results, folder / "zero.json")
    document = text(folder, "zero.json", suffix=".html")
    assert "bf16-control: left out where the divergence is zero" in document
    assert "left out where" not in page


def test_words_of_a_file_stay_words(folder: Path) -> None:
    name = changed(folder, device="<script>alert(1)</script> | $x^2$", model={"name": "a&b", "hash": None})
    page, markdown = text(folder, name, suffix=".html"), text(folder, name)
    assert "<script" not in page
    assert html.escape("<script>alert(1)</script>") in page
    assert "a&amp;b" in page
    assert "<script" not in markdown
    assert "\\| $x^2$" in markdown


LINKS = "[here](http://a.b) ![x](data:,) [r]: https://c.d www.e.f <http://g.h> a@b.c `code` **bold**"


def test_markdown_makes_no_link_and_no_image_of_words_of_a_file(folder: Path) -> None:
    """Read by a Markdown parser; the control is the same text as it stands."""
    plain = text(folder, changed(folder, device=LINKS))
    assert "\\`code\\` \\*\\*bold\\*\\*" in plain
    for markdown, expected in ((plain, False), (plain + LINKS, True)):
        body = markdown.partition("\n\n")[2]
        assert bool(re.search(r"(?<!\\)\]\(|(?<!\\)\]:|https?:|www\.|<http|\w@", body)) == expected


def test_flipped_examples_can_be_read(folder: Path, page: str) -> None:
    results = sample.results(limit=3)
    lost = next(flipped for flipped in results["flipped"] if flipped["arm"] == "uniform")
    assert lost["right_to_wrong"]
    markdown = text(folder, "nvfp4.json")
    for words in (lost["prompt"], lost["reference"], lost["answer"]):
        assert html.escape(words) in page
        assert f"```\n{words}\n```" in markdown
    assert markdown.count("<details>") == markdown.count("</details>") == len(results["flipped"]) > 0


def test_a_fence_is_longer_than_those_in_a_text(folder: Path) -> None:
    results = sample.results(limit=3)
    results["flipped"][0]["answer"] = "```\n[link](http://a.b)\n````"
    sample.save(results, folder / "fence.json")
    assert "`````\n```\n[link](http://a.b)\n````\n`````" in text(folder, "fence.json")


def test_one_example_has_a_report(folder: Path) -> None:
    first = next(iter(synthetic.records(1)))
    made = [record for record in synthetic.records(1) if record.example == first.example]
    sample.save(synthetic.summarized(made, synthetic.run()), folder / "one.json")
    document = text(folder, "one.json")
    assert "1 example, transformers" in document
    assert "1 example is too few to tell accuracies apart" in document
    assert "1 examples" not in document
    for suffix in (".html", ".png"):
        assert render([folder / "one.json"], Path(f"report{suffix}"))


def test_a_control_in_batches_of_one_is_not_called_the_noise_floor(folder: Path) -> None:
    damage = {"bf16-control": synthetic.Damage(0.0, 0.0, 0.0), "phase": synthetic.USUAL["phase"]}
    made = synthetic.records(60, damage)
    for batch_size, floor in ((1, False), (2, True)):
        run = synthetic.run(damage) | {"batch_size": batch_size}
        sample.save(synthetic.summarized(made, run), folder / "alone.json")
        document = text(folder, "alone.json")
        assert ("| bf16-control (noise floor) |" in document) == floor
        assert ("bf16-control is bf16 again, and no noise floor" in document) != floor


def test_figure_and_table_agree_on_what_counts_as_equal(folder: Path) -> None:
    """A real loss inside the margin is no equality, in neither; a loss that is ruled out is one, in both."""
    results = sample.results(limit=3)
    for pair, kind in zip(results["comparisons"], ["no-loss", "loss", "undecided", "loss", "gain"], strict=True):
        pair |= {"kind": kind, "low": -0.004, "high": 0.02, "accuracy_difference": 0.001}
    results["margin"] = 0.01
    for pair in results["comparisons"]:
        pair["margin"] = 0.01
    results["comparisons"][3]["low"] = -0.02
    sample.save(results, folder / "equal.json")
    found = accuracy.sections(read(folder / "equal.json"))
    table, charts = next(found).blocks[1:]
    assert [row.cells[0] for row in table.rows] == [
        "no loss beyond the margin", "a loss within the margin", "undecided", "a loss", "a gain",
    ]  # fmt: skip
    assert [row.equal for row in charts.charts[0].rows] == [True, False, False, False, False]
    assert [row.outcome for row in charts.charts[0].rows] == [row.cells[0] for row in table.rows]


def test_prompt_tokens_are_a_numeric_axis(folder: Path) -> None:
    chart = curves(folder, "lookup, accuracy")
    rungs = sample.results(limit=3)["arms"]["bf16"]["tasks"]["lookup"]["rungs"]
    assert [point.x for point in chart.lines[0].points] == [rung["prompt_tokens"] for rung in rungs]
    assert not chart.x.ticks


def test_bands_that_reach_zero_are_drawn_down_to_the_axis(folder: Path) -> None:
    from matplotlib.figure import Figure

    chart = curves(folder, "lookup, divergence")
    line = chart.lines[0]
    reaching = [replace(point, band=(0.0, 2 * point.y)) for point in line.points]
    figure = Figure(figsize=(charts.WIDTH / 72, charts.HEIGHT / 72), dpi=72)
    charts.draw(replace(chart, lines=[replace(line, points=reaching)]), figure, palette.names([]), (0, 0))
    axes = figure.axes[0]
    corners = axes.collections[0].get_paths()[0].vertices
    floor = axes.get_ylim()[0]
    assert min(corners[:, 1]) == pytest.approx(floor)
    assert {x for x, y in corners if y == pytest.approx(floor)} == {point.x for point in reaching}


def test_a_report_is_small(folder: Path) -> None:
    """The committed results: 22 charts of five arms; most of matplotlib's own SVG is said once for all, or left out."""
    committed = Path(__file__).parents[2] / "benchmarks/results/demo-nvfp4-h100.json"
    assert len(render([committed], Path("report.html"))) < 200_000


def test_png_is_an_image_of_the_charts(picture: bytes) -> None:
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    assert picture.startswith(b"\x89PNG")
    assert width == 1600  # two charts of 400 units, doubled
    assert height > 5 * 2 * 262


def test_reporting_needs_no_framework(folder: Path) -> None:
    seen = "import atexit, sys; atexit.register(lambda: print({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    command = [sys.executable, "-c", f"{seen}; {RUN}", "report", folder / "nvfp4.json", "-o", folder / "quick.md"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert (folder / "quick.md").read_text(encoding="utf-8").startswith("- [demo, nvfp4: 14 rungs")


@pytest.mark.parametrize(
    ("report", "results"),
    [
        ("demo-report.md", ["demo-nvfp4-h100.json", "demo-nvfp4-h100-short.json"]),
        ("smollm2-report.md", ["smollm2-nvfp4-h200.json", "smollm2-fp8-h200.json", "smollm2-tail-h200.json"]),
        ("gemma3-report.md", ["gemma3-nvfp4-h200.json", "gemma3-fp8-h200.json"]),
    ],
)
def test_the_committed_reports_are_those_of_the_committed_results(report: str, results: list[str]) -> None:
    root = Path(__file__).parents[2]
    files = [root / "benchmarks/results" / name for name in results]
    assert render(files, Path(report)) == (root / "docs" / report).read_bytes()
