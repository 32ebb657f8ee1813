"""Puts a page together: one part for each results file, with its bench figures, or for each bench file alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixquant.errors import InputError
from mixquant.report import accuracy, divergence, palette, speed
from mixquant.report.documents import Document
from mixquant.report.numerals import count, kernel_words
from mixquant.report.page import Commands, Facts, Page, Part, Section

Json = Mapping[str, Any]


def page(results: Sequence[Document], benches: Sequence[Document], output: str) -> Page:
    """The report of these files; output: the name it will have, for the command that makes it again."""
    models = {(found.data["model"]["name"], found.data["model"].get("hash")) for found in results}
    if benches and len(models) > 1:
        raise InputError(
            f"{benches[0].name} does not say which of the {len(models)} models it timed: "
            "report it with the results of one model."
        )
    again = f"mixquant report {' '.join(found.name for found in [*results, *benches])} -o {output}"
    parts = [*(_results_part(found, benches, again) for found in results), *(_bench_part(b, again) for b in benches)]
    arms = {arm for found in results for arm in found.data["arms"]}
    arms |= {row["arm"] for bench in benches for row in bench.data["rows"]}
    return Page(title=" · ".join(dict.fromkeys(part.name for part in parts)), parts=parts, arms=palette.in_order(arms))


def _results_part(found: Document, benches: Sequence[Document], again: str) -> Part:
    results = found.data
    verdict = results["verdict"]
    examples = max(arm["all"]["n"] for arm in results["arms"].values())
    name = f"{results['model']['name']}, {results['format']}"
    about = (
        f"{name} prompts, tail {results['tail']}, {count(examples)} examples, {results['engine']} on "
        f"{results['device']}, mixquant {results['mixquant']}"
    )
    if emulated := [arm for arm, found in palette.items(results["arms"]) if found["emulated"]]:
        about += f". Emulated: {', '.join(emulated)}"
    sections = [
        *accuracy.sections(results),
        *divergence.sections(results),
        *(speed.against_divergence(results, bench.data) for bench in benches),
        _machine(results, examples),
        _reproduce([results["command"], again]),
    ]
    details = [*verdict["details"], *results.get("notes", ())]
    return Part(name=name, sentence=verdict["sentence"], about=about, details=details, sections=sections)


def _bench_part(found: Document, again: str) -> Part:
    bench = found.data
    arms = palette.in_order({row["arm"] for row in bench["rows"]})
    sentence = f"Times of {', '.join(arms)}, measured on {bench['device']}."
    about = f"{found.name}, {len(bench['rows'])} rows"
    return Part(
        name=f"times on {bench['device']}",
        sentence=sentence,
        about=about,
        sections=[speed.times(bench), _reproduce([again])],
    )


def _machine(results: Json, examples: int) -> Section:
    tokens = results["prompt_tokens"]
    rows = [
        ("Model", results["model"]["name"]),
        ("Fingerprint", results["model"].get("hash") or "not known"),
        ("Engine", results["engine"]),
        ("Device", results["device"]),
        ("Policy", f"{results['format']} prompts, tail {results['tail']}"),
        ("Prompt tokens", f"{count(tokens['min'])} to {count(tokens['max'])}, median {count(tokens['median'])}"),
        ("Examples", f"{count(examples)}, data seeds {', '.join(map(str, results['seeds']))}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(results["versions"].items()))),
        *_kernels(results["arms"]),
    ]
    lead = "What ran: a result belongs to these kernels on this machine."
    return Section(anchor="machine", title="Kernels and machine", lead=lead, blocks=[Facts(rows=rows)])


def _kernels(arms: Json) -> Iterator[tuple[str, str]]:
    for name, arm in palette.items(arms):
        yield f"Kernels of {name}", kernel_words(arm["kernels"]) + (" (emulated)" if arm["emulated"] else "")


def _reproduce(commands: Sequence[str]) -> Section:
    lead = "On the same machine the same seeds give the same figures and, to the byte, the same report."
    return Section(anchor="reproduce", title="How to reproduce", lead=lead, blocks=[Commands(lines=commands)])
