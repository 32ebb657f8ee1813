"""What the README shows runs: every Python block, and every mixquant command. What documents quote is committed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.commandline import MIXQUANT

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASUREMENTS = (ROOT / "docs/measurements.md").read_text(encoding="utf-8")
BENCH = (ROOT / "docs/bench.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md", ROOT / "training/README.md"]
)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("mixquant")
]

SERVE = "mixquant serve demo --prefill nvfp4"
ELSEWHERE = ("mixquant demo", SERVE, f"{SERVE} --prefill-servers 1 --decode-servers 1")
"""Commands that tests/commands run: in test_demo, (with its client) in test_served, and in test_pair."""

BRIEFLY = {"eval": "--seeds 1"}
"""What the tests add to a command: the same work a third as often."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all commands run: what one writes, another reads."""
    path = tmp_path_factory.mktemp("readme")
    (path / "examples").symlink_to(ROOT / "examples")
    return path


def run(command: str, folder: Path) -> str:
    _, name, *options = shlex.split(f"{command} {BRIEFLY.get(command.split()[1], '')}")
    result = subprocess.run([*MIXQUANT, name, *options], capture_output=True, text=True, cwd=folder, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readme_has_blocks_to_run() -> None:
    assert sum(language == "python" for language, _ in BLOCKS) >= 1
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize(
    "block", [block for language, block in BLOCKS if language == "python" and "openai" not in block]
)
def test_python_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ELSEWHERE])
def test_commands_run(command: str, folder: Path) -> None:
    before = set(folder.iterdir())
    assert run(command, folder) or set(folder.iterdir()) > before


def test_the_verdict_and_the_table_of_the_measurements_are_the_committed_ones() -> None:
    results = json.loads((ROOT / "benchmarks/results/demo-nvfp4-h100.json").read_text(encoding="utf-8"))
    assert f"> {results['verdict']['sentence']}\n" in MEASUREMENTS
    assert "Uniform is enough here" in MEASUREMENTS
    short = json.loads((ROOT / "benchmarks/results/demo-nvfp4-h100-short.json").read_text(encoding="utf-8"))
    assert "Uniform is enough here" in short["verdict"]["sentence"]
    arms = [results["arms"][arm] for arm in ("bf16", "uniform", "phase", "decode-only")]
    for task in [*arms[0]["tasks"], "all"]:
        scores = [arm["all"] if task == "all" else arm["tasks"][task] for arm in arms]
        cells = [f"{100 * score['accuracy']:.1f} ± {100 * score['se']:.1f}" for score in scores]
        assert f"| {task} | {' | '.join(cells)} |" in MEASUREMENTS


RESULTS = r"benchmarks/results/[\w.-]+|docs/demo-report\.md"
"""Files whose figures other pages quote."""


def quoted(page: str) -> list[tuple[list[str], str]]:
    """Of each table row that links a file of results, or whose table follows a paragraph that does: its figures with a
    decimal point, and what the file holds."""
    found, above = [], ""
    for block in page.split("\n\n"):
        if not block.startswith("|"):
            above = block
            continue
        for row in block.splitlines():
            if files := re.findall(RESULTS, row) or re.findall(RESULTS, above):
                figures = re.findall(r"(?<![\w.])\d+\.\d+\b(?![.\w])", re.sub(r"\(.*?\)|vLLM [\d.]+", "", row))
                found.append((figures, "".join((ROOT / file).read_text(encoding="utf-8") for file in files)))
    return found


@pytest.mark.parametrize(
    ("page", "count"), [(README, 32), (MEASUREMENTS, 8), (BENCH, 44)], ids=["readme", "measurements", "bench"]
)
def test_the_figures_in_a_row_are_in_the_file_that_it_links(page: str, count: int) -> None:
    rows = quoted(page)
    assert sum(len(figures) for figures, _ in rows) >= count
    for figures, text in rows:
        assert set(figures) <= set(re.findall(r"\d+\.\d+", text))


def test_control_a_figure_that_nothing_printed_is_found() -> None:
    strange = [
        set(figures) - set(re.findall(r"\d+\.\d+", text)) for figures, text in quoted(README.replace("160.6", "186.0"))
    ]
    assert [each for each in strange if each] == [{"186.0"}]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings; equal ones are numbered."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if re.match(r"#+ ", line)]
    anchors = [re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in lines]
    before = [anchors[:place].count(anchor) for place, anchor in enumerate(anchors)]
    return {f"{anchor}-{n}" if n else anchor for anchor, n in zip(anchors, before, strict=True)}


def test_the_milliseconds_in_the_vllm_page_are_the_committed_ones() -> None:
    page = (ROOT / "docs/vllm.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:first token|decode step), (?!ms)[^|]*(.*)$", page, re.MULTILINE)
    shown = [number for row in rows for number in re.findall(r"[\d.]+", row)]
    assert len(shown) == 52
    committed = (ROOT / "benchmarks/results/bench-8b-h200.md").read_text(encoding="utf-8")
    assert set(shown) <= set(re.findall(r"\d+\.\d+", committed))
