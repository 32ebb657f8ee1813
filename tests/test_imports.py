"""Layers: what each module may import, and what `import mixquant` must not."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mixquant

SOURCE = Path(mixquant.__file__).parent

ALLOWED = {
    # our lower layers: what of ours, and which library, each may import; heavier ones never
    "errors": set(),
    "phase": set(),
    "metrics": {"torch"},
    "significance": {"metrics"},
    "policy": {"errors"},
    "formats": {"errors", "formats", "torch"},
    "scales": {"formats", "torch"},
    "kernels": {"errors", "formats", "kernels", "policy", "scales", "torch"},
    "linear": {"errors", "kernels", "phase", "torch"},
    "tracking": {"errors", "linear", "phase", "torch"},
}


def imports(source: str) -> set[str]:
    """Layers of ours and libraries that a module's source imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.split(".")[1] for name in names if name.startswith("mixquant.")}
    return ours | ({name.split(".")[0] for name in names} - sys.stdlib_module_names - {"mixquant"})


def files(layer: str) -> list[Path]:
    return [SOURCE / f"{layer}.py"] if (SOURCE / f"{layer}.py").exists() else sorted((SOURCE / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", ALLOWED)
def test_a_lower_layer_imports_nothing_above_it(layer: str) -> None:
    assert files(layer)
    for file in files(layer):
        assert imports(file.read_text(encoding="utf-8")) <= ALLOWED[layer], file


def test_allowed_imports_have_no_cycle() -> None:
    """Layers are in the order of the table: each imports only itself and those before it."""
    order = list(ALLOWED)
    for layer, allowed in ALLOWED.items():
        assert all(order.index(other) <= order.index(layer) for other in allowed - {"torch"})


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import vllm.platforms", "vllm"),
        ("from mixquant import linear", "linear"),
        ("from mixquant.convert import convert_", "convert"),
        ("def f():\n    import mixquant.kernels.cpu", "kernels"),
    ],
)
def test_control_every_way_to_import_is_seen(source: str, found: str) -> None:
    assert imports("import os\n" + source) == {found}


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
