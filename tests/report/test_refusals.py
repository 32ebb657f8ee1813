"""Bad input: one sentence that names the remedy, and the old report untouched."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mixquant.errors import InputError
from mixquant.report import write

from ..commandline import call, refuse
from . import sample


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return sample.results(limit=2)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A report that is already there, and must survive."""
    path = tmp_path / "report.html"
    path.write_text("the old report", encoding="utf-8")
    return path


def refusal(output: Path, *inputs: Path) -> str:
    before = {path: path.read_bytes() for path in output.parent.iterdir() if path.is_file()}
    with pytest.raises(InputError) as caught:
        write(inputs, output)
    assert {path: path.read_bytes() for path in output.parent.iterdir() if path.is_file()} == before
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x80\x81", "is not JSON"),
        (b'{"version": 1', "is not JSON"),
        (b"[]", "is not a results file"),
        (b'{"model": "demo"}', "is not a results file"),
        (b'{"arms": {}, "version": 1}', "is of version 1 and this mixquant reads version 2"),
        (b'{"arms": {}}', "is of version null"),
        (b'{"rows": []}', "is not a results file"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"arms":' * 100_000, "is not JSON"),
        (b'{"arms": "\\ud800"}', "is not JSON"),
        (b'{"arms": 3, "version": 2}', "is not whole (mixquant is missing)"),
    ],
)
def test_what_is_no_results_file_is_named(tmp_path: Path, output: Path, content: bytes, said: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    assert said in refusal(output, path)


def test_a_missing_file_is_named(tmp_path: Path, output: Path) -> None:
    assert "gone.json cannot be read (No such file or directory)" in refusal(output, tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (["arms"], {}, "arms is empty"),
        (["arms", "phase", "tasks"], {}, "arms.phase.tasks is empty"),
        (["arms", "phase", "all", "accuracy"], "high", 'arms.phase.all.accuracy is "high"'),
        (["arms", "phase", "all", "accuracy"], True, "arms.phase.all.accuracy is true"),
        (["arms", "phase", "divergence", "by_position", 0, "start"], None, "by_position[0].start is null"),
        (["arms", "phase", "tasks", "lookup", "rungs"], 3, "arms.phase.tasks.lookup.rungs is not a list"),
        (["arms", "phase", "tasks", "lookup", "rungs"], [], "arms.phase.tasks.lookup.rungs is empty"),
        (["arms", "phase", "tasks", "lookup", "n"], 0, "arms.phase.tasks.lookup.n is 0"),
        (["arms", "phase", "tasks", "lookup", "seeds", "100"], None, "lookup.seeds.100 is null"),
        (["arms", "phase", "divergence", "quantiles"], [[0.5]], "quantiles[0][1] is missing"),
        (["arms", "phase", "divergence", "survival", 0], [1, 2, 3], "survival[0] has 3 items, not 2"),
        (["arms", "phase", "divergence", "kld_se"], -1, "arms.phase.divergence.kld_se is -1"),
        (["arms", "phase", "divergence", "by_layer"], 3, "arms.phase.divergence.by_layer is not a list"),
        (["arms", "phase", "divergence", "by_layer", 0], {}, "by_layer[0].layer is missing"),
        (["model", "hash"], {"sha": 1}, 'model.hash is {"sha": 1}'),
        (["verdict"], "good", "verdict is not an object"),
        (["arms", "phase", "all", "accuracy"], 1.5, "arms.phase.all.accuracy is 1.5"),
        (["arms", "phase", "all", "accuracy"], float("inf"), "arms.phase.all.accuracy is null"),
        (["time", "started"], "yesterday", 'time.started is "yesterday"'),
        (["comparisons", 0, "arm"], "turbo", 'compares an arm "turbo" that is not in it'),
        (["comparisons", 0, "against"], "turbo", 'compares an arm "turbo" that is not in it'),
    ],
)
def test_a_damaged_file_names_the_place(
    tmp_path: Path, output: Path, results: dict[str, Any], place: list[Any], value: Any, said: str
) -> None:
    damaged = copy.deepcopy(results)
    inner = damaged
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    assert said in refusal(output, sample.save(damaged, tmp_path / "results.json"))


def test_every_key_that_is_relied_on_is_asked_for(tmp_path: Path, output: Path, results: dict[str, Any]) -> None:
    """Leaving out a key either makes no difference or is refused; nothing fails later."""
    for key in results:
        less = {name: value for name, value in results.items() if name != key}
        path = sample.save(less, tmp_path / "less.json")
        try:
            write([path], tmp_path / "less.md")
        except InputError as error:
            assert key in str(error)  # noqa: PT017


def test_arms_that_do_not_match_are_refused(tmp_path: Path, output: Path, results: dict[str, Any]) -> None:
    arms = results["arms"]
    alone = {name: arm for name, arm in arms.items() if name != "bf16"}
    assert "no bf16 arm" in refusal(output, sample.save(results | {"arms": alone}, tmp_path / "a.json"))
    fewer = arms["phase"] | {"tasks": {"lookup": arms["phase"]["tasks"]["lookup"]}}
    other = results | {"arms": arms | {"phase": fewer}}
    assert "other tasks in arm phase" in refusal(output, sample.save(other, tmp_path / "b.json"))
    foreign = results | {"arms": arms | {"turbo": arms["phase"]}}
    assert "has an arm 'turbo': report it with" in refusal(output, sample.save(foreign, tmp_path / "c.json"))


def test_outputs_that_cannot_be(tmp_path: Path, output: Path, results: dict[str, Any]) -> None:
    path = sample.save(results, tmp_path / "results.json")
    assert "not report.pdf" in refusal(tmp_path / "report.pdf", path)
    (tmp_path / "folder.html").mkdir()
    assert "folder.html cannot be written (Is a directory)" in refusal(tmp_path / "folder.html", path)
    with pytest.raises(InputError, match=r"report\.md cannot be written \(No such file or directory\)"):
        write([path], tmp_path / "nowhere" / "report.md")
    with pytest.raises(InputError, match=r"report\.md cannot be written \(Not a directory\)"):
        write([path], path / "report.md")
    with pytest.raises(InputError, match=r"report\.md cannot be written"):
        write([path], Path("/proc/report.md"))  # nobody may write there, root neither


@pytest.mark.parametrize(("missing", "suffix"), [("matplotlib", ".html"), ("matplotlib", ".png"), ("jinja2", ".html")])
def test_a_missing_extra_is_one_sentence(
    tmp_path: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch, missing: str, suffix: str
) -> None:
    path = sample.save(results, tmp_path / "results.json")
    monkeypatch.setitem(sys.modules, missing, None)  # as Python does not find it
    assert "pip install 'mixquant[plot]'" in refuse("report", path, "-o", tmp_path / f"report{suffix}")
    assert call("report", path, "-o", tmp_path / "report.md").returncode == 0


def test_a_number_that_is_none_is_read_as_missing(tmp_path: Path, results: dict[str, Any]) -> None:
    arms = copy.deepcopy(results["arms"])
    arms["phase"]["all"]["se"] = float("nan")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results | {"arms": arms}), encoding="utf-8")
    write([path], tmp_path / "report.md")
    row = next(line for line in (tmp_path / "report.md").read_text(encoding="utf-8").splitlines() if "| phase" in line)
    assert "±" not in row.split("|")[2]
