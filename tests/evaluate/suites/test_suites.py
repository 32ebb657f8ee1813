"""Which examples a run gets: by name, in a fixed order, and only those that fit the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.evaluate import suites
from mixquant.evaluate.items import Item
from mixquant.evaluate.runner import prepare
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.prompts import encode, token_ids
from mixquant.tasks import LADDER

WINDOW = 3072


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find("demo"))


def tokens(tokenizer: Any, item: Item) -> int:
    return encode(tokenizer, item.prompt).shape[1]


def facts(items: list[Item]) -> list[Item]:
    """Items without their checkers, which are equal only to themselves."""
    return [replace(item, check=bool) for item in items]


def test_agent_is_its_four_families_in_order(tokenizer: Any) -> None:
    items, notes = suites.load(["agent"], [3, 4], 2, tokenizer, WINDOW)
    places = [(i.task, i.rung, i.seed, i.index) for i in items]
    assert places == [(t, r, s, i) for t in LADDER for r in range(len(LADDER[t])) for s in (3, 4) for i in range(2)]
    assert notes == []


def test_a_name_twice_is_run_once(tokenizer: Any) -> None:
    once, _ = suites.load(["lookup", "arithmetic"], [0], 1, tokenizer, WINDOW)
    again, _ = suites.load(["lookup", "arithmetic", "lookup"], [0], 1, tokenizer, WINDOW)
    assert facts(once) == facts(again)
    assert suites.expand(["arithmetic", "agent"]) == ["arithmetic", "lookup", "multihop", "toolcall"]


def test_an_example_does_not_depend_on_what_else_is_asked_for(tokenizer: Any) -> None:
    few, _ = suites.load(["toolcall", "retrieval"], [5], 1, tokenizer, WINDOW)
    many, _ = suites.load(["retrieval", "agent"], [4, 5], 2, tokenizer, WINDOW)
    assert all(item in facts(many) for item in facts(few))
    assert len({json.dumps(item.prompt) for item in many}) == len(many)


@pytest.mark.parametrize("task", [*LADDER, "retrieval"])
def test_the_reference_is_right_within_the_limit_and_a_wrong_answer_is_not(tokenizer: Any, task: str) -> None:
    for item in suites.load([task], [1], 1, tokenizer, WINDOW).items:
        assert item.reference is not None
        assert item.limit is not None
        assert item.is_right(item.reference)
        assert not item.is_right(item.reference[:-1])
        assert not item.is_right("")
        assert len(tokenizer(item.reference).input_ids) < item.limit
        assert tokens(tokenizer, item) + item.limit <= WINDOW


def test_a_cap_leaves_out_rungs_whose_typical_prompt_is_longer_and_says_so(tokenizer: Any) -> None:
    all_items, _ = suites.load(["arithmetic"], [0], 9, tokenizer, WINDOW)
    prompts = [median(tokens(tokenizer, i) for i in all_items if i.rung == rung) for rung in range(3)]
    for cap, left in ((int(prompts[1]), 2), (int(prompts[1]) - 1, 1)):
        items, notes = suites.load(["arithmetic"], [0], 9, tokenizer, WINDOW, max_prompt_tokens=cap)
        assert {item.rung for item in items} == set(range(left))
        assert len(notes) == 1
        assert f"{len(LADDER['arithmetic']) - left} rungs" in notes[0]
        assert f"longer than {cap} prompt tokens" in notes[0]


def test_rungs_beyond_the_window_are_left_out_whole(tokenizer: Any) -> None:
    items, notes = suites.load(["lookup", "retrieval"], [0], 6, tokenizer, window=2048)
    counts = {(i.task, i.rung): sum(j.task == i.task and j.rung == i.rung for j in items) for i in items}
    assert counts == {("lookup", 0): 6, ("lookup", 1): 6, ("lookup", 2): 6, ("lookup", 3): 6,
                      ("retrieval", 0): 6, ("retrieval", 1): 6}  # fmt: skip
    assert notes[0].startswith("lookup: left out 2 rungs (16 steps, 60 records to 16 steps, 72 records)")
    assert notes[1].startswith("retrieval: left out 10 rungs (3K tokens to 1M tokens)")
    assert all("window of 2048 tokens" in note for note in notes)


def test_nothing_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"No example is left to run \(lookup: left out 6 rungs .*lift the cap\.$"):
        suites.load(["lookup"], [0], 1, tokenizer, WINDOW, max_prompt_tokens=100)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["agnet"], "Unknown task 'agnet': did you mean agent?"),
        (["gsm8"], "did you mean gsm8k?"),
        (["tasks.json"], "FILE.jsonl"),
        ([], "No task is named"),
        (["a/mine.jsonl", "b/mine.jsonl"], "2 tasks are called mine: rename"),
        (["lookup", "a/lookup.jsonl"], "2 tasks are called lookup: rename"),
    ],
)
def test_bad_names_are_refused_before_anything_is_read(names: list[str], complaint: str) -> None:
    with pytest.raises(InputError) as error:
        suites.expand(names)
    assert complaint in str(error.value)


def test_a_task_file_is_run_once_whatever_the_seeds(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    texts = ["short", "word " * 900, "also short", "third"]
    rows = [{"prompt": text, "answer": "x", "checker": "exact", "max_tokens": 100} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    items, notes = suites.load([str(path)], [7, 8, 9], 10, tokenizer, window=1000)
    assert [(i.task, i.seed, i.index, i.prompt) for i in items] == [
        ("mine", 0, 0, "short"), ("mine", 0, 2, "also short"), ("mine", 0, 3, "third"),
    ]  # fmt: skip
    assert notes == ["mine: left out 1 example: longer with their answers than the context window of 1000 tokens."]
    assert [i.index for i in suites.load([str(path)], [7], 2, tokenizer, window=1000).items] == [0, 2]
    assert len(suites.load([str(path)], [7], 10, tokenizer, window=None).items) == 4


def test_a_prompt_is_tokenized_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is most of what making examples costs."""
    seen: list[Any] = []

    def counted(tokenizer: Any, prompt: Any) -> list[int]:
        seen.append(prompt)
        return token_ids(tokenizer, prompt)

    monkeypatch.setattr(suites, "token_ids", counted)
    examples = prepare(suites.load(["lookup"], [0], 6, tokenizer, WINDOW).items, tokenizer, WINDOW)
    assert len(seen) == len(examples) == 36
    assert all(example.query.ids == token_ids(tokenizer, example.item.prompt) for example in examples[::9])


def test_what_is_made_is_said(tokenizer: Any) -> None:
    said: list[str] = []
    suites.load(["toolcall"], [0], 1, tokenizer, WINDOW, 500, said.append)
    assert said[:2] == ["toolcall", "toolcall, 1 step, 8 records"]


def test_a_bad_task_file_is_refused_before_anything_is_made(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("{bad")
    with pytest.raises(InputError, match="line 1"):
        suites.load(["agent", str(path)], [0], 1, tokenizer, WINDOW, say=lambda text: pytest.fail(text))
