"""Tasks of lm-eval as questions, on local YAML and JSON: held against what lm-eval itself asks and counts as right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from mixquant.checkpoint.locate import find
from mixquant.commands import evaluate as evaluation
from mixquant.errors import InputError
from mixquant.integrations.lm_eval_tasks import read
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.tasks import Question

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/test.jsonl
    train: {folder}/train.jsonl
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_target: "{{{{a}}}}"
description: "Add.\\n"
num_fewshot: 2
generation_kwargs:
  until: ["\\n\\n", "Q:"]
  max_gen_toks: 12
  do_sample: false
filter_list:
  - name: strict
    filter:
      - function: regex
        regex_pattern: "#### ([0-9]+)"
      - function: take_first
  - name: lenient
    filter:
      - function: regex
        regex_pattern: "([0-9]+)"
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    ignore_case: true
"""
ANSWERS = ["it is 3", "#### 7", "5 Q: 9", "none", "4 or 12", "12"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="module")
def chat() -> Any:
    return load_tokenizer(find("demo"))


@pytest.fixture(scope="module")
def plain() -> Any:
    tokenizer = load_tokenizer(find("demo"))
    tokenizer.chat_template = None
    return tokenizer


def write(folder: Path, name: str = "sums", **changes: str) -> Path:
    """A task of six sums; changes: lines by their beginnings."""
    for split, first in (("test", 1), ("train", 50)):
        rows = [{"q": f"{i}+{i + 1}", "a": str(2 * i + 1)} for i in range(first, first + 6)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = TASK.format(name=name, folder=folder).splitlines()
    for begin, line in changes.items():
        lines = [line if known.strip(" -").startswith(begin) else known for known in lines]
    path = folder / f"{name}.yaml"
    path.write_text("\n".join(lines))
    return path


class Canned(LM):
    """A model of lm-eval that writes `ANSWERS` and remembers what it was asked."""

    tokenizer_name, rank, world_size = "demo", 0, 1

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer, self.asked = tokenizer, []

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked = [request.args[0] for request in requests]
        texts = ANSWERS[: len(requests)]
        return [min((text.split(stop)[0] for stop in requests[0].args[1]["until"]), key=len) for text in texts]

    def loglikelihood(self, requests: list[Instance]) -> Any:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
        raise NotImplementedError


def run_lm_eval(path: Path, tokenizer: Any, **options: Any) -> tuple[list[str], list[bool]]:
    """The prompts that lm-eval makes, and whether it counts each of `ANSWERS` as right after the last filter."""
    model = Canned(tokenizer)
    manager = TaskManager(include_path=str(path.parent), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=[path.stem], task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )
    samples = [s for s in results["samples"][path.stem] if s["filter"] == "lenient"]
    return model.asked, [s["exact_match"] == 1 for s in sorted(samples, key=lambda sample: sample["doc_id"])]


def questions(path: Path | str, tokenizer: Any) -> list[Question]:
    return list(read(str(path), tokenizer).rungs[""])


def test_text_and_verdicts_are_lm_evals_own(tmp_path: Path, plain: Any) -> None:
    path = write(tmp_path)
    found = questions(path, plain)
    prompts, right = run_lm_eval(path, plain)
    assert [question.prompt for question in found] == prompts
    assert [question.is_right(text) for question, text in zip(found, ANSWERS, strict=True)] == right
    assert len(set(right)) == 2, "a checker that always says the same would pass"
    assert [question.answer for question in found] == ["3", "5", "7", "9", "11", "13"]
    assert {(question.limit, question.stops, question.reference) for question in found} == {(12, ("\n\n", "Q:"), "")}


def test_a_chat_is_lm_evals_own(tmp_path: Path, chat: Any) -> None:
    path = write(tmp_path)
    prompts, _ = run_lm_eval(path, chat, apply_chat_template=True, fewshot_as_multiturn=True)
    found = questions(path, chat)
    rendered = [chat.apply_chat_template(q.prompt, tokenize=False, add_generation_prompt=True) for q in found]
    assert rendered == prompts
    assert [message["role"] for message in found[0].prompt][-3:] == ["user", "assistant", "user"]


def test_a_task_that_begins_the_answer_is_asked_as_text(tmp_path: Path, chat: Any) -> None:
    path = write(tmp_path, description='gen_prefix: "The sum is"')
    prompts, _ = run_lm_eval(path, chat)
    assert [question.prompt for question in questions(path, chat)] == prompts
    assert prompts[0].endswith("The sum is")


def test_what_is_right_is_said(tmp_path: Path, chat: Any) -> None:
    assert read(str(write(tmp_path)), chat).note == "Right is exact_match 1 after lm-eval's filter lenient."


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"output_type": "output_type: loglikelihood"}, "A loglikelihood task decodes nothing: choose one that"),
        ({"do_sample": "  do_sample: true"}, "The task samples its answers: arms are compared on greedy"),
        ({"num_fewshot": "repeats: 4"}, "asks for several answers"),
        ({"metric: exact": "  - metric: bleu", "ignore_case": ""}, "The metric bleu is no share of right answers"),
        ({"test:": "    test: /nowhere.jsonl"}, "lm-eval cannot load"),
        ({"doc_to_text": 'doc_to_text: "{{q"'}, "lm-eval cannot load"),
    ],
)
def test_refusals_are_one_sentence(tmp_path: Path, chat: Any, changes: dict[str, str], complaint: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        read(str(path), chat)
    assert complaint in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_names_that_are_no_task_of_lm_eval(tmp_path: Path, chat: Any) -> None:
    with pytest.raises(
        InputError,
        match=r"^Unknown lm-eval task 'gsm8kk': did you mean gsm8k\? `mixquant lm-eval ls tasks` lists all\.$",
    ):
        read("gsm8kk", chat)
    for group in ("mmlu", "math_word_problems"):  # the second is a tag
        with pytest.raises(InputError, match=f"{group} is a group of lm-eval: name its tasks"):
            read(group, chat)
    with pytest.raises(InputError, match=r"none\.yaml is no file"):
        read(str(tmp_path / "none.yaml"), chat)


@pytest.mark.slow
def test_a_task_runs_in_the_arms(tmp_path: Path) -> None:
    """The whole command's way: its examples once, whatever the seeds, and the sentence about its check."""
    path = write(tmp_path)
    chosen = evaluation.Settings(model="demo", arms=["bf16", "phase"], tasks=[str(path)], seeds=[1, 2], limit=4)
    evaluation.evaluate(chosen, tmp_path / "results.json", "command")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"]["phase"]["tasks"]["sums"]["n"] == 4
    assert results["notes"] == ["sums: Right is exact_match 1 after lm-eval's filter lenient."]
