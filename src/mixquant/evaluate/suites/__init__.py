"""What the arms are asked: tasks by name, as lists of examples that fit the model.

    load(["agent", "retrieval"], seeds=[0, 1, 2], limit=100, tokenizer=tokenizer, window=3072)

    agent         the four families of the agent ladder; each also by its own name: arithmetic, lookup, ...
    retrieval     two records among many, in contexts from 1K tokens up to the model's window
    mine.jsonl    the user's own examples, one a line
    gsm8k, ...    known benchmarks from the hub (`mixquant.evaluate.suites.presets`)

Ladders are made on the spot: an example is a pure function of its rung, data seed and index (and of the tokenizer,
where a length in tokens is promised). Their rungs are whole: one that does not fit the model is left out and noted.
Data sets are what they are: they are run once, as seed 0, and single examples that do not fit are left out and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from mixquant.errors import InputError
from mixquant.evaluate.items import Item
from mixquant.policy import choose_name
from mixquant.prompts import Tokenizer, token_ids
from mixquant.tasks import LADDER

from . import files, ladders, presets

NAMES = ("agent", *ladders.LADDERS, *presets.PRESETS)
"""Every name but those of task files."""

MARGIN = 8
"""Tokens that an answer may have more than the reference: its end, and a longer wrong one."""


class Selection(NamedTuple):
    """Examples by task, rung, seed and index, each with its limit set; and what a reader of their results should know.

    notes: sentences about what was left out, and about how a preset's check differs from its official score.
    """

    items: list[Item]
    notes: list[str]


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


def read(wanted: Iterable[str]) -> dict[str, list[Item]]:
    """All examples of the data sets among the tasks named, which needs no model.

    InputError for an unknown name, a bad line of a task file, and a preset whose data cannot be had.
    """
    sets = [task for task in expand(wanted) if task not in ladders.LADDERS]
    return {task: presets.read(task) if task in presets.PRESETS else files.read(Path(task)) for task in sets}


def load(
    wanted: Sequence[str],
    seeds: Sequence[int],
    limit: int,
    tokenizer: Tokenizer,
    window: int | None,
    max_prompt_tokens: int | None = None,
    say: Callable[[str], None] = lambda text: None,
    data: Mapping[str, Sequence[Item]] | None = None,
) -> Selection:
    """The examples of the tasks named: `limit` for each rung and seed, and up to `limit` of each data set.

    window: the model's context window in tokens, None where it has none. max_prompt_tokens: leave out rungs whose
    median prompt is longer, and examples of data sets that are. say: called with what is being made, for a long wait.
    data: what `read` gives, where it was read before. InputError as `read`, and where nothing is left.
    """
    data = read(wanted) if data is None else data
    room = _Room(tokenizer, window, max_prompt_tokens)
    items: list[Item] = []
    notes: list[str] = []
    for task in expand(wanted):
        say(_title(task))
        part = _draw(task, data[task], limit, room) if task in data else _climb(task, seeds, limit, room, say)
        items += part.items
        notes += part.notes
    if not items:
        raise InputError(f"No example is left to run ({' '.join(notes)}): name other tasks, or lift the cap.")
    return Selection(items, notes)


@dataclass(frozen=True)
class _Room:
    """What fits a model: prompt and answer into its context window, and the prompt below the user's cap."""

    tokenizer: Tokenizer
    window: int | None
    cap: int | None

    def measured(self, item: Item) -> Item:
        """The example with its prompt's tokens and its longest answer."""
        limit = item.limit
        if limit is None and item.reference is not None:
            limit = len(self.tokenizer(item.reference, add_special_tokens=False).input_ids) + MARGIN
        return replace(item, limit=limit, ids=token_ids(self.tokenizer, item.prompt))

    def obstacle(self, items: Sequence[Item]) -> str | None:
        """Why these measured examples cannot be run together: the longest is too long, or the typical one is."""
        prompts = [len(item.ids or ()) for item in items]
        longest = max(prompt + (item.limit or 0) for prompt, item in zip(prompts, items, strict=True))
        return self.excess(longest, median(prompts))

    def excess(self, context: float, prompt: float) -> str | None:
        if self.window is not None and context > self.window:
            return f"longer with their answers than the context window of {self.window} tokens"
        if self.cap is not None and prompt > self.cap:
            return f"longer than {self.cap} prompt tokens"
        return None


def _climb(task: str, seeds: Sequence[int], limit: int, room: _Room, say: Callable[[str], None]) -> Selection:
    """The rungs of a ladder that fit, whole."""
    places = [(seed, index) for seed in seeds for index in range(limit)]
    items: list[Item] = []
    left_out = defaultdict(list)
    for rung in ladders.rungs(task):
        say(f"{task}, {rung.label}")
        examples, reason = _fitting(rung, places, room)
        items += examples
        if reason:
            left_out[reason].append(rung.label)
    return Selection(items, [f"{task}: left out {_span(labels)}: {reason}." for reason, labels in left_out.items()])


def _fitting(rung: ladders.Rung, places: Sequence[tuple[int, int]], room: _Room) -> tuple[list[Item], str | None]:
    """All examples of a rung, or none and why; where a promise or a few examples tell, no others are made."""
    if reason := room.excess(rung.context, rung.prompt):
        return [], reason
    examples: list[Item] = []
    for some in (places[:5], places[5:]):
        examples += [room.measured(rung.make(room.tokenizer, *place)) for place in some]
        if reason := room.obstacle(examples):
            return [], reason
    return examples, None


def _draw(task: str, data: Sequence[Item], limit: int, room: _Room) -> Selection:
    """The first examples of a data set that fit."""
    preset = presets.PRESETS.get(task)
    items: list[Item] = []
    left_out: Counter[str] = Counter()
    for item in map(room.measured, data):
        if len(items) == limit:
            break
        if reason := room.obstacle([item]):
            left_out[reason] += 1
        else:
            items.append(item)
    notes = [f"{_title(task)}: left out {_count(count)}: {reason}." for reason, count in left_out.items()]
    return Selection(items, notes + ([f"{task}: {preset.score}"] if preset else []))


def _count(examples: int) -> str:
    return "1 example" if examples == 1 else f"{examples} examples"


def _span(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{len(labels)} rungs ({labels[0]} to {labels[-1]})"


def _known(name: str) -> str:
    """A task's name, or the path of a task file."""
    return name if name.endswith(".jsonl") else choose_name("task", name, (*NAMES, "FILE.jsonl"))


def _title(task: str) -> str:
    return Path(task).stem if task.endswith(".jsonl") else task
