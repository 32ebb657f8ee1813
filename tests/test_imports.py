"""The rooms of the house: each imports only rooms below it, wherever in a file the import stands."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mixquant

SOURCE = Path(mixquant.__file__).parent

ROOMS = (
    (
        "errors",
        "files",
        "packages",
        "phase",
        "policy",
        "layers",
        "devices",
        "prompts",
    ),  # the idea: when, how, which layers
    ("formats",),  # numbers: the truth that everything is compared to
    ("kernels",),  # who multiplies, and why
    ("checkpoint",),  # a folder on disk: what MODEL is
    ("model",),  # a torch model in two precisions
    ("tasks",),  # what agents are asked
    ("evaluate",),  # evidence
    ("bench",),  # how fast
    ("integrations",),  # engines
    ("offline",),  # the quantizer
    ("report",),  # results as a page
    ("commands",),  # what a user types
    ("cli",),
)
"""All packages and modules of mixquant, from the ground up. Neighbours on the ground floor stand in this order too."""

ORDER = [room for floor in ROOMS for room in floor]

ENGINES = {"lm_eval", "openai", "transformers", "vllm"}
"""What only `integrations` may import."""

PLAIN = {"errors", "phase", "policy", "layers"}
"""Rooms that import no library at all."""


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def module(file: Path) -> str:
    parts = ("mixquant", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """The dotted name of everything that a source imports, `if TYPE_CHECKING` and inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(source: str) -> set[str]:
    """The rooms that a source imports from; the package's own name is none."""
    return {name.split(".")[1] for name in imports(source) if name.startswith("mixquant.")} & set(ORDER)


def libraries(source: str) -> set[str]:
    return {name.split(".")[0] for name in imports(source)} - sys.stdlib_module_names - {"mixquant"}


def test_every_room_has_its_floor() -> None:
    folders = {room(file) for file in sources()} - {"__init__", "__main__", "demo"}
    assert folders == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    below = set(ORDER[: ORDER.index(name) + 1])
    for file in sources():
        if room(file) == name:
            assert ours(file.read_text(encoding="utf-8")) <= below, file


def test_modules_import_each_other_in_no_circle() -> None:
    """Module by module, so circles inside a room are found too."""
    names = {module(file) for file in sources()} - {"mixquant"}
    graph = {}
    for file in sources():
        found = set()
        for name in imports(file.read_text(encoding="utf-8")):
            found |= {name, name.rpartition(".")[0]} & names
        graph[module(file)] = found - {module(file), module(file).rpartition(".")[0]}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(reversed(error.args[1]))}")


def test_only_integrations_import_an_engine() -> None:
    found = {file: libraries(file.read_text(encoding="utf-8")) & ENGINES for file in sources()}
    assert {file for file, engines in found.items() if engines and room(file) != "integrations"} == set()
    assert {engine for engines in found.values() for engine in engines} == ENGINES


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_the_idea_needs_no_library(name: str) -> None:
    assert libraries((SOURCE / f"{name}.py").read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import mixquant.kernels.cpu", "kernels"),
        ("from mixquant import offline", "offline"),
        ("from mixquant.model.convert import convert_", "model"),
        ("def f():\n    import mixquant.kernels.cpu", "kernels"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mixquant.cli import app", "cli"),
    ],
)
def test_control_every_way_to_import_is_seen(source: str, found: str) -> None:
    assert ours("import os\n" + source) == {found}


def test_importing_mixquant_imports_no_framework() -> None:
    assert loaded_frameworks("import mixquant; mixquant.__version__; dir(mixquant)") == "[]"
    assert loaded_frameworks("import mixquant; mixquant.Policy.parse('nvfp4'); mixquant.InputError") == "[]"


def test_control_a_framework_is_seen_when_a_name_needs_it() -> None:
    assert loaded_frameworks("import mixquant; mixquant.convert_") == "['torch']"


def loaded_frameworks(code: str) -> str:
    """Which of the three frameworks a fresh interpreter has loaded after `code`."""
    report = f"{code}; import sys; print(sorted({{'torch', 'transformers', 'vllm'}} & sys.modules.keys()))"
    return subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", mixquant.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(getattr(mixquant, name), "__name__", name) == name
    assert name in dir(mixquant)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        mixquant.quantise  # noqa: B018


def test_contributing_names_every_room_from_the_ground_up() -> None:
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = page[page.index("| room in `src/mixquant/`") :].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)/?`", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert [name for row in rows for name in row] == ORDER
