"""Presets: rows of each data set's documented schema become examples; without its data a preset is one sentence.

The rows are made up and nothing is downloaded: the hub's real client works on a cache folder of the test's own.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.evaluate import suites
from mixquant.evaluate.suites import presets, rows
from mixquant.evaluate.suites.checkers import KINDS, checker
from mixquant.integrations.transformers.loading import load_tokenizer

CHAT = [{"role": "user", "content": "I adopted a cat in May."}, {"role": "assistant", "content": "Lovely!"}]
MEMORY = {
    "question_id": "q1", "question_type": "single-session-user", "question": "When did I adopt a cat?",
    "answer": "May", "question_date": "2023/06/01 (Thu) 10:00", "haystack_session_ids": ["s1"],
    "haystack_dates": ["2023/05/20 (Sat) 02:21"], "haystack_sessions": [CHAT], "answer_session_ids": ["s1"],
}  # fmt: skip
ROWS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    # a row, a phrase of the prompt, a right text and a wrong one
    "gsm8k": (
        {"question": "Ann has 1,000 pens and 234 more?", "answer": "1000+234=<<1000+234=1234>>1234.\n#### 1,234"},
        "1,000 pens", "She has 1,234 pens.", "She has 234 pens.",
    ),
    "math500": (
        {"problem": "Half of $\\pi$?", "solution": "...", "answer": "\\frac{\\pi}{2}", "subject": "Algebra", "level": 1,
         "unique_id": "test/algebra/1.json"},
        "\\boxed{}", "It is \\boxed{\\dfrac{\\pi}{2}}.", "It is \\boxed{\\frac{2}{\\pi}}.",
    ),
    "aime24": (
        {"id": 60, "problem": "Find n.", "solution": "...", "answer": "025", "url": "...", "year": "2024"},
        "Find n.", "\\boxed{25}", "\\boxed{24}",
    ),
    "aime25": ({"problem": "Find m.", "answer": "70", "id": "0"}, "Find m.", "\\boxed{70}", "70"),
    "longbench-v2": (
        {"_id": "66f", "domain": "Code", "sub_domain": "QA", "difficulty": "easy", "length": "short",
         "question": "Which?", "choice_A": "one", "choice_B": "two", "choice_C": "three", "choice_D": "four",
         "answer": "C", "context": "A long text."},
        "<text>\nA long text.\n</text>\n\nWhich?\n\n(A) one\n(B) two", "The correct answer is (C).", "Is (C) like (A)?",
    ),
    "longmemeval": (MEMORY, "[2023/05/20 (Sat) 02:21]\nuser: I adopted a cat in May.", "In May, you said.", "In June."),
    "bfcl": (
        {"id": "simple_0", "question": [[{"role": "user", "content": "Area of 10 by 5?"}]],
         "function": [{"name": "area", "description": "...", "parameters": {"type": "dict", "properties": {}}}],
         "ground_truth": [{"area": {"base": [10], "height": [5], "unit": ["units", ""]}}]},
        '{"name": "area"', '[{"name": "area", "arguments": {"base": 10, "height": 5}}]', "area(base=10, height=5)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_row_becomes_an_example(name: str) -> None:
    preset = presets.PRESETS[name]
    row, phrase, right, wrong = ROWS[name]
    example = preset.convert(row)
    assert example is not None
    assert example.prompt[-1]["role"] == "user"
    assert phrase in "\n".join(message["content"] for message in example.prompt)
    assert KINDS[preset.checker].fits(example.answer)
    assert checker(preset.checker)(right, example.answer)
    assert not checker(preset.checker)(wrong, example.answer)


def test_rows_that_cannot_be_checked_are_left_out() -> None:
    assert rows.longmemeval(MEMORY | {"question_id": "q1_abs"}) is None
    assert rows.longmemeval(MEMORY | {"question_type": "single-session-preference"}) is None
    counted = rows.longmemeval(MEMORY | {"answer": 3})
    assert counted is not None
    assert counted.answer == "3"
    question = {key: value for key, value in ROWS["bfcl"][0].items() if key != "ground_truth"}
    assert rows.bfcl(question) is None


def test_rows_of_several_files_are_joined_by_id() -> None:
    joined = rows.join([{"id": "a", "x": 1}, {"id": "b", "x": 2}, {"id": "a", "y": 3}, {"z": 1}, {"z": 2}])
    assert joined == [{"id": "a", "x": 1, "y": 3}, {"id": "b", "x": 2}, {"z": 1}, {"z": 2}]


@pytest.mark.parametrize("form", ["parquet", "lines", "list"])
def test_files_of_every_form_give_the_same_rows(tmp_path: Path, form: str) -> None:
    wanted = [{"problem": "Ö?", "answer": "1"}, {"problem": "b\u2028?", "answer": "2"}]
    path = tmp_path / ("rows.parquet" if form == "parquet" else "rows.json")
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(wanted), path)
    else:
        dump: Callable[[Any], str] = lambda value: json.dumps(value, ensure_ascii=False)  # noqa: E731
        path.write_text(dump(wanted) if form == "list" else "\n".join(map(dump, wanted)) + "\n", encoding="utf-8")
    assert list(rows.read(path)) == wanted


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, which is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put_in_cache(cache: Path, dataset: str, file: str, text: str) -> None:
    """Lay a file where the hub's client keeps what it has downloaded."""
    folder = cache / f"datasets--{dataset.replace('/', '--')}"
    path = folder / "snapshots" / ("0" * 40) / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text("0" * 40)


def test_a_preset_reads_the_cache_in_a_fixed_shuffled_order(cache: Path) -> None:
    problems = [{"problem": f"Problem {i}", "answer": str(i), "id": str(i)} for i in range(30)]
    put_in_cache(cache, "math-ai/aime25", "test.jsonl", "".join(json.dumps(p) + "\n" for p in problems))
    items = presets.read("aime25")
    answers = [int(item.answer) for item in items]
    assert sorted(answers) == list(range(30))
    assert answers[:5] == [21, 29, 4, 24, 13]  # the order must not change: a limit draws the first of it
    assert [(item.task, item.seed, item.index) for item in items] == [("aime25", 0, i) for i in range(30)]
    assert {item.limit for item in items} == {8192}
    assert all(item.is_right(f"\\boxed{{{item.answer}}}") for item in items)
    chosen = suites.load(["aime25"], [4, 5], 3, load_tokenizer(find("demo")), window=9000)
    assert [item.prompt for item in chosen.items] == [item.prompt for item in items[:3]]
    assert chosen.notes == [f"aime25: {presets.PRESETS['aime25'].score}"]


def test_questions_and_answers_in_files_of_their_own_are_joined(cache: Path) -> None:
    preset, row = presets.PRESETS["bfcl"], ROWS["bfcl"][0]
    for number, file in enumerate(preset.files):
        keys = ("ground_truth",) if file.startswith("possible_answer/") else ("question", "function")
        line = {"id": f"{number // 2}"} | {key: row[key] for key in keys}
        put_in_cache(cache, preset.dataset, file, json.dumps(line) + "\n")
    items = presets.read("bfcl")
    assert len(items) == len(preset.files) // 2
    assert all(item.answer == row["ground_truth"] for item in items)


def refusal(name: str) -> tuple[str, float]:
    """The sentence of a preset whose data cannot be had, and the seconds it took."""
    start = time.perf_counter()
    with pytest.raises(InputError) as error:
        suites.load([name], [0], 1, load_tokenizer(find("demo")), 3072)
    return str(error.value), time.perf_counter() - start


@pytest.mark.parametrize("name", presets.PRESETS)
def test_offline_a_preset_names_what_it_needs(cache: Path, name: str) -> None:
    sentence, _ = refusal(name)
    preset = presets.PRESETS[name]
    assert sentence.startswith(f"{name} needs {preset.files[0]} of the data set {preset.dataset} ({preset.needs}), ")
    assert f"run `hf download --repo-type dataset {preset.dataset}` where there is network, and set HF_HOME" in sentence


def test_a_hub_that_does_not_answer_is_not_waited_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as silent:  # takes connections, says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(presets, "PATIENCE", 0.5)
        sentence, seconds = refusal("gsm8k")
    assert "cannot be downloaded (ReadTimeout)" in sentence
    assert seconds < 5
