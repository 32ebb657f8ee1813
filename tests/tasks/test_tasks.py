"""The synthetic agent tasks: deterministic, exactly checkable, and of the stated length in tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import mixquant
from mixquant.tasks import LADDER, TASKS, TOOLS, Difficulty, generate
from mixquant.tasks.transcript import ROLE

DEMO = Path(mixquant.__file__).parent / "demo"
RUNGS = [(task, rung) for task, rungs in LADDER.items() for rung in range(len(rungs))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.mark.parametrize(("task", "rung"), RUNGS)
def test_reference_is_right_and_errors_are_not(task: str, rung: int) -> None:
    example = generate(task, rung, seed=5, index=3)
    assert example.is_right(example.reference)
    assert not example.is_right("")
    assert not example.is_right(example.reference[: len(example.reference) // 2])
    assert not example.is_right(example.reference + "\nanswer: 1234567")
    last_digit = max(i for i, c in enumerate(example.reference) if c.isdigit())
    wrong = str((int(example.reference[last_digit]) + 1) % 10)
    assert not example.is_right(example.reference[:last_digit] + wrong + example.reference[last_digit + 1 :])


def test_examples_depend_on_task_rung_seed_and_index_alone() -> None:
    assert generate("lookup", 1, 2, 3) == generate("lookup", LADDER["lookup"][1], 2, 3)
    keys = [("lookup", 1, 2, 3), ("lookup", 2, 2, 3), ("lookup", 1, 3, 3), ("lookup", 1, 2, 4), ("multihop", 1, 2, 3)]
    assert len({json.dumps(generate(*key).prompt) for key in keys}) == len(keys)


def test_known_example() -> None:
    """The stream of random numbers must not change: published results depend on it."""
    assert generate("multihop", Difficulty(steps=3, records=8), 0, 0).reference == (
        "328.next=628\n628.next=755\n755.next=756\n756.qty=280\nanswer: 280"
    )


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_records(task: str) -> None:
    example = generate(task, 1, seed=5, index=0)
    pages = [json.loads(m["content"]) for m in example.prompt if m["content"].startswith('{"page"')]
    records = {record["id"]: record for page in pages for record in page["records"]}
    assert len(records) == LADDER[task][1].records
    if task == "toolcall":
        call = json.loads(example.answer)["arguments"]
        assert [records[item["id"]]["qty"] for item in call["items"]] == [item["qty"] for item in call["items"]]
        assert call["total"] == sum(item["qty"] for item in call["items"])
        return
    for line in example.reference.splitlines()[:-1]:
        fields = dict(pair.split("=") for pair in line.partition(".")[2].split(" "))
        record = records[line.partition(".")[0]]
        assert all(str(record[name]) == value for name, value in fields.items() if name != "total")


@pytest.mark.parametrize(("task", "rung"), RUNGS)
def test_length_in_tokens(tokenizer: Any, task: str, rung: int) -> None:
    for index in range(4):
        example = generate(task, rung, seed=5, index=index)
        prompt = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True)["input_ids"]
        answer = tokenizer(example.reference)["input_ids"]
        assert 380 < len(prompt) < 2850
        assert 25 < len(answer) < 260
        assert len(prompt) + len(answer) < tokenizer.model_max_length


def test_digits_are_tokens_and_text_survives(tokenizer: Any) -> None:
    assert tokenizer.tokenize("482.qty=137")[:3] == ["4", "8", "2"]
    text = 'Grüße, {"id": "482"}\n\t<tool_call>'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 512


def test_template_renders_tools_as_the_examples_do(tokenizer: Any) -> None:
    messages = generate("toolcall", 0, 0, 0).prompt
    with_tools = [{"role": "system", "content": ROLE}, *messages[1:]]
    assert tokenizer.apply_chat_template(with_tools, tools=TOOLS, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_model_fits_the_repository() -> None:
    assert (DEMO / "model" / "model.safetensors").stat().st_size <= 20_000_000


@pytest.mark.parametrize("path", sorted((DEMO / "transcripts").glob("*.json")), ids=lambda path: path.stem)
def test_transcripts_are_prompts(tokenizer: Any, path: Path) -> None:
    messages = json.loads(path.read_text())["messages"]
    assert messages[-1]["role"] == "user"
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert 600 < len(prompt) < 1300
