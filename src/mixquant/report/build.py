"""Puts a page together: one part for each results file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from mixquant.bench import results as bench
from mixquant.errors import InputError
from mixquant.evaluate.results import Results
from mixquant.policy import ARMS
from mixquant.report import accuracy, divergence, palette, speed
from mixquant.report.numerals import count, date, duration, kernel_words
from mixquant.report.page import Facts, Page, Part, Section, reproduction

Found = Results | bench.Results
AGAIN = "On the same machine the same seeds give the same figures; only date and duration are others."


def page(found: Mapping[Path, Found], output: str) -> Page:
    """The report of these files; output: the name it will have, for the command that makes it again."""
    for path, results in found.items():
        _check(path, results)
    again = f"mixquant report {' '.join(path.name for path in found)} -o {output}"
    names = {path: _name(results) for path, results in found.items()}
    often = Counter(names.values())
    parts = [
        _part(f"{names[path]} ({path.name})" if often[names[path]] > 1 else names[path], results, again)
        for path, results in found.items()
    ]
    arms = [arm for results in found.values() for arm in _drawn(results)]
    return Page(title=" · ".join(part.name for part in parts), parts=parts, arms=list(dict.fromkeys(arms)))


def _check(path: Path, results: Found) -> None:
    if isinstance(results, bench.Results):
        return
    if unknown := [arm for arm, found in results.arms.items() if arm not in ARMS and found.policy is None]:
        raise InputError(f"{path} has an arm {min(unknown)!r}: report it with the release that wrote it.")


def _drawn(results: Found) -> list[str]:
    """What charts draw lines for."""
    if isinstance(results, bench.Results):
        return [*results.arms, *speed.cases(results)]
    return [arm for arm, _ in palette.items(results.arms)]


def _name(results: Found) -> str:
    """What tells a part from others: the model, the format and the rungs."""
    if isinstance(results, bench.Results):
        return speed.name(results)
    rungs = sum(len(task.rungs) for task in results.reference.tasks.values())
    tokens = results.prompt_tokens
    return (
        f"{results.model.name}, {results.format}: {rungs} rung{'s' * (rungs != 1)} of {count(tokens.min)} to "
        f"{count(tokens.max)} prompt tokens"
    )


def _part(name: str, results: Found, again: str) -> Part:
    if isinstance(results, bench.Results):
        return speed.part(name, results, again)
    examples = results.reference.all.n
    about = (
        f"{results.format} prompts, tail {results.tail}, {count(examples)} example{'s' * (examples != 1)}, "
        f"{results.engine} on {results.device}, {results.software}"
    )
    if results.time and results.time.started is not None:
        about += f", {date(results.time.started)}"
    if emulated := [arm for arm, found in palette.items(results.arms) if found.emulated]:
        about += f". Emulated: {', '.join(emulated)}"
    sections = [
        *accuracy.sections(results),
        *divergence.sections(results),
        _machine(results, examples),
        reproduction(AGAIN, [results.command, again]),
    ]
    details = [*results.verdict.details, *results.notes]
    return Part(name=name, sentence=results.verdict.sentence, about=about, details=details, sections=sections)


def _machine(results: Results, examples: int) -> Section:
    tokens = results.prompt_tokens
    rows = [
        ("Model", results.model.name),
        ("Fingerprint", results.model.hash or "not known"),
        ("Engine", results.engine),
        ("Device", f"{results.device}, {results.threads} CPU thread{'s' * (results.threads != 1)}"),
        ("Policy", f"{results.format} prompts, tail {results.tail}"),
        *_policies(results),
        ("Prompt tokens", f"{count(tokens.min)} to {count(tokens.max)}, median {count(tokens.median)}"),
        ("Examples", f"{count(examples)}, data seeds {', '.join(map(str, results.seeds))}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(results.versions.items()))),
        *_when(results),
        *_kernels(results),
    ]
    lead = "What ran: a result belongs to these kernels on this machine."
    return Section(anchor="machine", title="Kernels and machine", lead=lead, blocks=[Facts(rows=rows)])


def _policies(results: Results) -> Iterator[tuple[str, str]]:
    """Of arms that have no names of their own."""
    for name, arm in palette.items(results.arms):
        if name not in ARMS and (policy := arm.policy):
            weights = f", weights of {policy.weights}" if policy.weights else ""
            yield f"Policy of {name}", f"prefill {policy.prefill}, decode {policy.decode}, tail {policy.tail}{weights}"


def _when(results: Results) -> Iterator[tuple[str, str]]:
    """Of the whole evaluation, whose duration says nothing about the speed of an arm."""
    if results.commit:
        yield "Commit", results.commit
    if results.time and results.time.started is not None:
        yield "Date", date(results.time.started)
    if results.time:
        yield "Duration", f"{duration(results.time.total_seconds)} for the whole evaluation"


def _kernels(results: Results) -> Iterator[tuple[str, str]]:
    for name, arm in palette.items(results.arms):
        yield f"Kernels of {name}", kernel_words(arm.kernels) + (" (emulated)" if arm.emulated else "")
