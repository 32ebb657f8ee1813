"""The document's file: what is read is written again, and what is damaged is one sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from benchmarks import merge

from mixquant.errors import InputError
from mixquant.evaluate.reading import read
from mixquant.evaluate.records import Journal
from mixquant.evaluate.results import Results
from mixquant.policy import Policy
from mixquant.report import render

from .synthetic import TASKS, Damage, records, run, summarized

COMMITTED = sorted((Path(__file__).parents[2] / "benchmarks/results").glob("demo-nvfp4-*.json"))


def test_there_are_committed_files() -> None:
    assert len(COMMITTED) == 3


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_what_was_read_is_written_again_and_has_a_report(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert json.loads(read(path).to_json()) == json.loads(text)
    assert render([path], Path("report.md"))


def test_merged_files_are_written_again_to_the_byte() -> None:
    path = next(path for path in COMMITTED if path.stem == "demo-nvfp4-h100")
    assert read(path).to_json() == path.read_text(encoding="utf-8")


def test_merged_parts_of_a_run_have_its_policies_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part a task; an arm without a name of its own is told by its policy alone."""
    policies = {"bf16": Policy(prefill="bf16"), "mine": Policy(prefill="nvfp4", tail=64)}
    identity = {key: value for key, value in run().items() if key not in ("arms", "command", "time")}
    made = records(60, {"mine": Damage(1e-3)})
    for task in TASKS:
        asked = {"arms": {arm: policy.to_dict() for arm, policy in policies.items()}, "suites": [task], "examples": {}}
        with closing(Journal(tmp_path / f"{task}.jsonl", identity | asked)) as journal:
            for arm in policies:
                journal.note(arm, {"emulated": True, "kernels": {"prefill": [], "decode": []}})
            journal.note("mine", {"by_layer": [{"layer": "l.0", "kld_mean": 0.1, "kld_se": 0.01, "sqnr_db": 20.0}]})
            journal.append(record for record in made if record.task == task)
    parts = [str(tmp_path / f"{task}.jsonl") for task in TASKS]
    monkeypatch.setattr(sys, "argv", ["merge.py", str(tmp_path / "whole.json"), "1", "command", *parts])
    merge.main()
    mine = read(tmp_path / "whole.json").arms["mine"]
    assert (mine.policy and mine.policy.tail, mine.all.n) == (64, 60)
    assert mine.divergence is not None
    assert mine.divergence.by_layer is not None
    assert b"Policy of mine" in render([tmp_path / "whole.json"], Path("report.md"))


def test_unknown_keys_are_kept(tmp_path: Path) -> None:
    document = summarized(records(60), run()) | {"novelty": {"x": [1]}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    assert read(path).to_dict() == document


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    document = summarized(records(60), run())
    for value in (float("nan"), float("inf"), 1e999):
        document["noise_floor"]["kld_mean"] = value
        floor = Results.model_validate_json(json.dumps(document)).noise_floor
        assert floor is not None
        assert floor.kld_mean is None


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place of a document, of lists the first item only."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


@pytest.mark.parametrize("wrong", [None, -1, 0, 1e308, 1e-300, 10**400, "", "word", True, [], {}, [[]]])
def test_whatever_is_wrong_there_is_a_report_or_one_sentence(tmp_path: Path, wrong: Any) -> None:
    """Every place of a small document in turn: a report or a refusal, and nothing else."""
    document = summarized(records(24), run())
    document["arms"] = {arm: document["arms"][arm] for arm in ("bf16", "phase")}
    document["comparisons"] = document["comparisons"][2:3]
    refused, path = 0, tmp_path / "results.json"
    for place in list(places(document))[1:]:
        inner: Any = document
        for key in place[:-1]:
            inner = inner[key]
        right, inner[place[-1]] = inner[place[-1]], wrong
        path.write_text(json.dumps(document), encoding="utf-8")
        inner[place[-1]] = right
        try:
            render([path], Path("report.md"))
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(path))  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
    assert refused > 20
