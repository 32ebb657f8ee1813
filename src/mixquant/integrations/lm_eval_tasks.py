"""lm-eval's generative tasks as questions of `mixquant eval`: hundreds of maintained benchmarks in all arms at once.

    read("gsm8k", tokenizer)           a task that lm-eval has
    read("my_tasks/mine.yaml", tokenizer)    one of the user's own, `include` and `!function` as lm-eval has them

What is taken from the task, unchanged: documents in their order, examples in the prompt, description, stop strings, the
longest answer, filters and metric. A text is right if the task's first metric gives it 1 after the task's last filter
(the most lenient one, by lm-eval's custom); a sentence in the results says which these are.

Asked is a chat, each example a turn of its own, where the tokenizer has a chat template, as in lm-eval's
`--apply_chat_template --fewshot_as_multiturn`; otherwise, and where a task begins the answer itself (`gen_prefix`), the
text that lm-eval would give.

Refused: tasks that only compare likelihoods, since they decode nothing; tasks that sample; metrics that are no share of
right answers, such as BLEU.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from mixquant.errors import InputError
from mixquant.evaluate.suites import DataSet
from mixquant.integrations.lm_eval import cut, greedy, stops
from mixquant.prompts import Tokenizer
from mixquant.tasks import Question

SEED = 1234
"""lm-eval's own, of the choice of examples in the prompt."""

Document = Mapping[str, Any]


def read(name: str, tokenizer: Tokenizer) -> DataSet:
    """The documents of a task, by its name in lm-eval or the path of its YAML file. InputError where it is refused."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    task = _load(name)
    try:
        metric = _check(task)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    task.set_fewshot_seed(SEED)
    note = f"Right is {metric} 1 after lm-eval's filter {task._filters[-1].name}."
    return DataSet({"": _questions(task, metric, tokenizer)}, note)


def _load(name: str) -> Task:
    """The one task of this name. Its code and its data may be anybody's, so they may raise anything."""
    is_file = name.endswith((".yaml", ".yml"))
    if is_file and not Path(name).is_file():
        raise InputError(f"{name} is no file: name a YAML file of an lm-eval task.")
    manager = _manager(defaults=not is_file)
    if not is_file and name not in manager.all_tasks:  # thousands: only the nearest is said
        close = difflib.get_close_matches(name, manager.all_tasks, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise InputError(f"Unknown lm-eval task {name!r}: {hint}`mixquant lm-eval ls tasks` lists all.")
    if name in (*manager.all_groups, *manager.all_tags):
        raise InputError(f"{name} is a group of lm-eval: name its tasks, which `mixquant lm-eval ls tasks` lists.")
    try:
        (task,) = manager.load([name])["tasks"].values()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(
            f"lm-eval cannot load {name} ({reason}): try it with `mixquant lm-eval`, and where there is no network "
            "bring the data set's cache along (HF_HOME)."
        ) from None
    return task


@cache
def _manager(defaults: bool) -> TaskManager:
    """The index of lm-eval's own tasks, which takes seconds to make, or an empty one."""
    return TaskManager(include_defaults=defaults)


def _check(task: Task) -> str:
    """The metric that says whether a text is right. Raises InputError for a task that arms cannot be compared on."""
    if task.OUTPUT_TYPE != "generate_until":
        raise InputError(f"A {task.OUTPUT_TYPE} task decodes nothing: choose one that generates (generate_until).")
    if (task.config.repeats or 1) > 1:
        raise InputError("The task asks for several answers, and greedy ones are all the same: choose another task.")
    greedy(task.config.generation_kwargs or {}, "arms are compared on greedy answers, choose another task")
    metric, value = next(iter(_results(task, task.eval_docs[0], "").items()))
    if not isinstance(value, Real) or not task.higher_is_better().get(metric, True):
        raise InputError(f"The metric {metric} is no share of right answers: choose another task.")
    return metric


def _questions(task: Task, metric: str, tokenizer: Tokenizer) -> Iterator[Question]:
    arguments = task.config.generation_kwargs or {}
    until = stops(arguments)
    for document in task.eval_docs:
        yield Question(
            prompt=_prompt(task, document, tokenizer),
            answer=str(task.doc_to_target(document)),
            check=_checker(task, document, metric, until),
            limit=greedy(arguments, "choose another task"),
            stops=until,
        )


def _prompt(task: Task, document: Document, tokenizer: Tokenizer) -> str | list[dict[str, Any]]:
    """A chat, or text where there is no template."""
    prefix = task.doc_to_prefix(document)
    chat = tokenizer.chat_template is not None and not prefix
    prompt: str | list[dict[str, Any]] = task.fewshot_context(
        document,
        num_fewshot=task.config.num_fewshot or 0,
        apply_chat_template=chat,
        fewshot_as_multiturn=True,
        chat_template=lambda messages, **_: messages,  # rendered when it is measured, as all chats are
        gen_prefix=prefix,
    )
    return prompt


def _checker(task: Task, document: Document, metric: str, until: tuple[str, ...]) -> Any:
    """Compares a text with the document, which knows more than the answer."""
    return lambda text, answer: float(_results(task, document, cut(text, until))[metric]) >= 1


def _results(task: Task, document: Document, text: str) -> dict[str, Any]:
    """The task's metrics of one answer."""
    chosen = task._filters[-1]
    instance = Instance("generate_until", document, (), 0, resps=[text])
    chosen.apply([instance])
    results: dict[str, Any] = task.process_results(document, [instance.filtered_resps[chosen.name]])
    return results
