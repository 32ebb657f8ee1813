"""Which examples a run gets: by name, in a fixed order, and only those that fit the model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.evaluate import items, suites
from mixquant.evaluate.items import MARGIN, Item
from mixquant.evaluate.suites import Amount, Capacity, DataSet, Selection
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.prompts import batch_token_ids, token_ids
from mixquant.tasks import LADDER, Question

WINDOW = 3072


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find("demo"))


def load(
    names: list[str], seeds: list[int], limit: int, tokenizer: Any, window: int | None = WINDOW, cap: int | None = None
) -> Selection:
    data = suites.read(names, tokenizer, no_lm_eval)
    return suites.load(names, data, Amount(seeds, limit), Capacity(tokenizer, window, cap))


def no_lm_eval(name: str) -> DataSet:
    pytest.fail(f"{name} is no task of lm-eval")


def facts(items: list[Item]) -> list[Any]:
    """Items without their checkers."""
    return [(item.place, item.query, item.draft, item.question.answer) for item in items]


def test_agent_is_its_four_families_in_order(tokenizer: Any) -> None:
    items, notes = load(["agent"], [3, 4], 2, tokenizer)
    places = [(i.place.task, i.place.rung, i.place.seed, i.place.index) for i in items]
    assert places == [(t, r, s, i) for t in LADDER for r in range(len(LADDER[t])) for s in (3, 4) for i in range(2)]
    assert notes == []


def test_a_name_twice_is_run_once(tokenizer: Any) -> None:
    once, _ = load(["lookup", "arithmetic"], [0], 1, tokenizer)
    again, _ = load(["lookup", "arithmetic", "lookup"], [0], 1, tokenizer)
    assert facts(once) == facts(again)
    assert suites.expand(["arithmetic", "agent"]) == ["arithmetic", "lookup", "multihop", "toolcall"]


def test_an_example_does_not_depend_on_what_else_is_asked_for(tokenizer: Any) -> None:
    few, _ = load(["toolcall", "retrieval"], [5], 1, tokenizer)
    many, _ = load(["retrieval", "agent"], [4, 5], 2, tokenizer)
    assert all(item in facts(many) for item in facts(few))
    assert len({json.dumps(item.query.prompt) for item in many}) == len(many)


@pytest.mark.parametrize("task", [*LADDER, "retrieval"])
def test_the_reference_is_right_within_the_limit_and_a_wrong_answer_is_not(tokenizer: Any, task: str) -> None:
    for item in load([task], [1], 1, tokenizer).items:
        reference, limit = item.question.reference, item.query.limit
        assert item.question.is_right(reference)
        assert not item.question.is_right(reference[:-1])
        assert not item.question.is_right("")
        assert item.draft == [*tokenizer(reference).input_ids, tokenizer.eos_token_id]
        assert len(item.draft) <= limit
        assert limit == (48 if task == "retrieval" else len(item.draft) - 1 + MARGIN)
        assert len(item.query.ids) + limit <= WINDOW


def test_a_cap_leaves_out_rungs_whose_typical_prompt_is_longer_and_says_so(tokenizer: Any) -> None:
    all_items, _ = load(["arithmetic"], [0], 9, tokenizer)
    prompts = [median(len(i.query.ids) for i in all_items if i.place.rung == rung) for rung in range(3)]
    for cap, left in ((int(prompts[1]), 2), (int(prompts[1]) - 1, 1)):
        items, notes = load(["arithmetic"], [0], 9, tokenizer, cap=cap)
        assert {item.place.rung for item in items} == set(range(left))
        assert len(notes) == 1
        assert f"{len(LADDER['arithmetic']) - left} rungs" in notes[0]
        assert f"longer than {cap} prompt tokens" in notes[0]


def test_rungs_beyond_the_window_are_left_out_whole(tokenizer: Any) -> None:
    items, notes = load(["lookup", "retrieval"], [0], 6, tokenizer, window=2048)
    counts = Counter((item.place.task, item.place.rung) for item in items)
    assert counts == {("lookup", 0): 6, ("lookup", 1): 6, ("lookup", 2): 6, ("lookup", 3): 6,
                      ("retrieval", 0): 6, ("retrieval", 1): 6}  # fmt: skip
    assert notes[0].startswith("lookup: left out 2 rungs (16 steps, 60 records to 16 steps, 72 records)")
    assert notes[1].startswith("retrieval: left out 10 rungs (3K tokens to 1M tokens)")
    assert all("window of 2048 tokens" in note for note in notes)


def test_nothing_left_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"No example is left to run \(lookup: left out 6 rungs .*lift the cap\.$"):
        load(["lookup"], [0], 1, tokenizer, cap=100)


@pytest.mark.parametrize(("limit", "refused"), [(10**9, True), (5001, True), (5000, False)])
def test_examples_of_a_rung_are_bounded_and_those_of_a_data_set_by_its_length(limit: int, refused: bool) -> None:
    amount = Amount([100, 101], limit)
    amount.check(["mine.jsonl", "lm-eval:gsm8k"])
    if refused:
        with pytest.raises(InputError, match=r"examples of each rung are more than 10,000: lower --limit or "):
            amount.check(["mine.jsonl", "retrieval"])
    else:
        amount.check(["retrieval"])


def test_examples_that_memory_does_not_hold_are_refused_after_the_first_few(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suites, "available_bytes", lambda device: 10**7)
    assert load(["arithmetic"], [0], 6, tokenizer).items
    made: list[int] = []
    monkeypatch.setattr(suites, "measure", lambda *given: made.append(len(given[1])) or items.measure(*given))
    with pytest.raises(InputError, match=r"5,000 examples of 1 step, 8 records take .* MiB, and 9.5 MiB are free"):
        load(["arithmetic"], [0], 5000, tokenizer)
    assert made == [5]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["agnet"], "Unknown task 'agnet': did you mean agent?"),
        (["retreival"], "did you mean retrieval?"),
        (["lm-eval:"], "lm-eval:TASK"),
        (["tasks.json"], "FILE.jsonl"),
        ([], "No task is named"),
        (["a/mine.jsonl", "b/mine.jsonl"], "2 tasks are called mine: rename"),
        (["lookup", "a/lookup.jsonl"], "2 tasks are called lookup: rename"),
        (["lm-eval:gsm8k", "gsm8k.yaml"], "2 tasks are called gsm8k: rename"),
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
    items, notes = load([str(path)], [7, 8, 9], 10, tokenizer, window=1000)
    assert [(i.place.task, i.place.seed, i.place.index, i.query.prompt) for i in items] == [
        ("mine", 0, 0, "short"), ("mine", 0, 2, "also short"), ("mine", 0, 3, "third"),
    ]  # fmt: skip
    assert notes == ["mine: left out 1 example: longer with their answers than the context window of 1000 tokens."]
    assert [i.place.index for i in load([str(path)], [7], 2, tokenizer, window=1000).items] == [0, 2]
    assert len(load([str(path)], [7], 10, tokenizer, window=None).items) == 4


def test_prompts_are_tokenized_together_as_each_alone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is most of what making items costs."""
    calls: list[int] = []

    def counted(tokenizer: Any, prompts: Any) -> list[list[int]]:
        calls.append(len(prompts))
        return batch_token_ids(tokenizer, prompts)

    monkeypatch.setattr(items, "batch_token_ids", counted)
    found = load(["lookup"], [0], 8, tokenizer).items
    assert calls == [5, 3] * 6
    assert all(item.query.ids == token_ids(tokenizer, item.query.prompt) for item in found[::9])
    chat, text = [{"role": "user", "content": "a"}], "<|im_start|>a"
    assert batch_token_ids(tokenizer, [text, chat, text]) == [token_ids(tokenizer, p) for p in (text, chat, text)]
    with pytest.raises(InputError, match="The prompt is empty"):
        batch_token_ids(tokenizer, [text, ""])


def test_lm_eval_reads_its_own_names_and_paths_and_nothing_else(tokenizer: Any) -> None:
    asked: list[str] = []

    def read(name: str) -> DataSet:
        asked.append(name)
        return DataSet({"": [Question(prompt=name, answer="a", check=str.__eq__, limit=3)] * 2}, "checked by a.")

    names = ["lm-eval:gsm8k", "lookup", "some/where/mine.yaml"]
    data = suites.read(names, tokenizer, read)
    assert asked == ["gsm8k", "some/where/mine.yaml"]
    chosen = suites.load(names, data, Amount([0], 1), Capacity(tokenizer, WINDOW))
    assert list(dict.fromkeys(item.place.task for item in chosen.items)) == ["gsm8k", "lookup", "mine"]
    assert len(chosen.items) == 8
    assert chosen.notes == ["gsm8k: checked by a.", "mine: checked by a."]


def test_what_is_made_is_shown(tokenizer: Any) -> None:
    shown: list[str] = []
    suites.load(["toolcall"], {}, Amount([0], 1), Capacity(tokenizer, WINDOW, 500), shown.append)
    assert shown[:2] == ["toolcall", "toolcall, 1 step, 8 records"]


def test_a_bad_task_file_is_refused_before_anything_is_made(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("{bad")
    with pytest.raises(InputError, match="line 1"):
        suites.read(["agent", str(path)], tokenizer, no_lm_eval)
