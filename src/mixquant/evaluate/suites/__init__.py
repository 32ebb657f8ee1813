"""What the arms are asked: tasks by name, as items that fit the model.

    data = read(["agent", "mine.jsonl"], lm_eval)
    load(["agent", "mine.jsonl"], data, Amount(seeds=[100, 101, 102], limit=100), capacity)

    agent           the four families of the agent ladder; each also by its own name: arithmetic, lookup, ...
    retrieval       two records among many, in contexts from 1K tokens up to the model's window
    bfcl            function calls with 1 to 40 functions on offer, and in dialogues; of the installed bfcl-eval
    mine.jsonl      the user's own examples, one a line
    lm-eval:gsm8k   a generative task of lm-eval, by name
    mine.yaml       the same from a file

Ladders are made on the spot: a question is a pure function of its rung, data seed and index (and of the tokenizer,
where a length in tokens is promised). Their rungs are whole: one that does not fit the model is left out and noted.
Data sets are what they are: they are run once, as seed 0, since repeating them would make errors look smaller than they
are. Single examples that do not fit are left out and counted, rung by rung where there are rungs.

lm-eval is an engine's business (`mixquant.integrations`), so who calls hands its reader down.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from mixquant.devices import available_bytes, size_text
from mixquant.errors import InputError
from mixquant.evaluate.items import Item, Place, measure
from mixquant.policy import choose_name
from mixquant.prompts import Tokenizer
from mixquant.tasks import LADDER, Question

from . import bfcl, files, ladders

NAMES = ("agent", *ladders.LADDERS, "bfcl")
"""Every name but those of files and of lm-eval's tasks."""

LM_EVAL = "lm-eval:"
FILES = (".jsonl", ".yaml", ".yml")
TOGETHER = 64
"""Questions of a data set that are measured together."""

MOST = 10_000
"""Examples that are made of a rung, all data seeds together."""

TOKEN_BYTES = 64
"""What a token of an item takes in memory: a Python integer and its text (47 bytes measured on the agent ladder)."""


class DataSet(NamedTuple):
    """The questions of a task that is not made here, by rung, and a sentence for readers of its results."""

    rungs: Mapping[str, Iterable[Question]]
    note: str = ""


class Amount(NamedTuple):
    """How much of the tasks is run: `limit` for each rung and seed, and up to `limit` of each rung of a data set."""

    seeds: Sequence[int]
    limit: int

    def check(self, tasks: Iterable[str]) -> None:
        """Raise InputError where more examples would be made than anybody waits for; a data set has its own length."""
        made = len(self.seeds) * self.limit
        if made > MOST and any(task in ladders.LADDERS for task in tasks):
            raise InputError(f"{made:,} examples of each rung are more than {MOST:,}: lower --limit or --seeds.")


class Selection(NamedTuple):
    """Items by task, rung, seed and index; and sentences about what was left out, and how a data set is checked."""

    items: list[Item]
    notes: list[str]


@dataclass(frozen=True)
class Capacity:
    """What fits a model.

    window: its context window in tokens, None where it has none. cap: the user's limit of prompt tokens, for the median
    of a rung and for each example of a data set.
    """

    tokenizer: Tokenizer
    window: int | None
    cap: int | None = None

    def obstacle(self, items: Sequence[Item]) -> str | None:
        """Why these items cannot be run together: the longest is too long, or the typical one is."""
        return self.excess(max(item.tokens for item in items), median(len(item.query.ids) for item in items))

    def excess(self, context: float, prompt: float) -> str | None:
        if self.window is not None and context > self.window:
            return f"longer with their answers than the context window of {self.window} tokens"
        if self.cap is not None and prompt > self.cap:
            return f"longer than {self.cap} prompt tokens"
        return None


def expand(wanted: Iterable[str]) -> list[str]:
    """The tasks behind names, each once; InputError for an unknown name, and for two tasks that would be called alike.

    Needs no model and reads no data, so a run can fail on a name before it loads anything.
    """
    tasks = list(dict.fromkeys(task for name in wanted for task in (LADDER if name == "agent" else [_known(name)])))
    if not tasks:
        raise InputError(f"No task is named: give one or more of {', '.join(NAMES)}, or a task file.")
    title, count = Counter(map(_title, tasks)).most_common(1)[0]
    if count > 1:
        raise InputError(f"{count} tasks are called {title}: rename the task files.")
    return tasks


def read(wanted: Iterable[str], tokenizer: Tokenizer, lm_eval: Callable[[str], DataSet]) -> dict[str, DataSet]:
    """The data sets among the tasks named, which needs no engine.

    tokenizer: its chat template says how functions are offered. lm_eval: reads a task of lm-eval by its name there, or
    by the path of its YAML file. InputError for an unknown name, a bad line of a task file, and a task that cannot be
    had or writes no answers.
    """

    def one(task: str) -> DataSet:
        if task == "bfcl":
            return DataSet(bfcl.rungs(tokenizer), bfcl.NOTE)
        if task.endswith(".jsonl"):
            return DataSet({"": files.read(Path(task))})
        return lm_eval(task.removeprefix(LM_EVAL))

    return {task: one(task) for task in expand(wanted) if task not in ladders.LADDERS}


def load(
    wanted: Sequence[str],
    data: Mapping[str, DataSet],
    amount: Amount,
    capacity: Capacity,
    progress: Callable[[str], None] = lambda text: None,
) -> Selection:
    """The items of the tasks named.

    data: what `read` gives. progress: called with what is being made. InputError where nothing is left.
    """
    items: list[Item] = []
    notes: list[str] = []
    for task in expand(wanted):
        progress(_title(task))
        if task in data:
            part = _draw(_title(task), data[task], amount.limit, capacity)
        else:
            part = _climb(task, amount, capacity, progress)
        items += part.items
        notes += part.notes
    if not items:
        raise InputError(f"No example is left to run ({' '.join(notes)}): name other tasks, or lift the cap.")
    return Selection(items, notes)


def _climb(task: str, amount: Amount, capacity: Capacity, progress: Callable[[str], None]) -> Selection:
    """The rungs of a ladder that fit, whole."""
    items: list[Item] = []
    left_out = defaultdict(list)
    for number, rung in enumerate(ladders.rungs(task)):
        progress(f"{task}, {rung.label}")
        places = [Place(task, number, seed, i, rung.label) for seed in amount.seeds for i in range(amount.limit)]
        found, reason = _fitting(rung, places, capacity)
        items += found
        if reason:
            left_out[reason].append(rung.label)
    return Selection(items, [f"{task}: left out {_span(labels)}: {reason}." for reason, labels in left_out.items()])


def _fitting(rung: ladders.Rung, places: Sequence[Place], capacity: Capacity) -> tuple[list[Item], str | None]:
    """All items of a rung, or none and why; where a promise or a few items tell, no others are made."""
    if reason := capacity.excess(rung.context, rung.prompt):
        return [], reason
    items: list[Item] = []
    for some in (places[:5], places[5:]):
        asked = [(place, rung.ask(capacity.tokenizer, place.seed, place.index)) for place in some]
        items += measure(capacity.tokenizer, asked)
        if reason := capacity.obstacle(items):
            return [], reason
        _check_memory(rung.label, items, len(places))
    return items, None


def _check_memory(label: str, first: Sequence[Item], count: int) -> None:
    """Raise InputError where `count` items such as the first do not fit into the memory that is left."""
    need = sum(item.tokens for item in first) * TOKEN_BYTES * (count - len(first)) // len(first)
    free = available_bytes(torch.device("cpu"))
    if free is not None and need > free:
        raise InputError(
            f"{count:,} examples of {label} take {size_text(need)}, and {size_text(free)} are free: lower --limit or "
            "--seeds."
        )


def _draw(title: str, data: DataSet, limit: int, capacity: Capacity) -> Selection:
    """The first items of each rung of a data set that fit."""
    items: list[Item] = []
    notes: list[str] = []
    for number, (label, questions) in enumerate(data.rungs.items()):
        part, left_out = _first(Place(title, number, 0, 0, label), questions, limit, capacity)
        items += part
        named = f"{title}, {label}" if label else title
        notes += [f"{named}: left out {_count(count)}: {reason}." for reason, count in left_out.items()]
    return Selection(items, notes + ([f"{title}: {data.note}"] if data.note else []))


def _first(
    rung: Place, questions: Iterable[Question], limit: int, capacity: Capacity
) -> tuple[list[Item], Counter[str]]:
    """The first items of a rung that fit, and how many did not, by the reason."""
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    for item in _measured(rung, questions, capacity):
        if len(items) == limit:
            break
        if reason := capacity.obstacle([item]):
            left_out[reason] += 1
        else:
            items.append(item)
    return items, left_out


def _measured(rung: Place, questions: Iterable[Question], capacity: Capacity) -> Iterator[Item]:
    """All items of a rung, some at a time."""
    places = ((replace(rung, index=index), question) for index, question in enumerate(questions))
    while some := list(islice(places, TOGETHER)):
        yield from measure(capacity.tokenizer, some)


def _count(examples: int) -> str:
    return "1 example" if examples == 1 else f"{examples} examples"


def _span(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{len(labels)} rungs ({labels[0]} to {labels[-1]})"


def _known(name: str) -> str:
    """A task's name, or the path of a file."""
    if name.endswith(FILES) or name.removeprefix(LM_EVAL) not in ("", name):
        return name
    return choose_name("task", name, (*NAMES, "FILE.jsonl", "lm-eval:TASK", "FILE.yaml"))


def _title(task: str) -> str:
    return Path(task).stem if task.endswith(FILES) else task.removeprefix(LM_EVAL)
