"""The installed vLLM has what the plugin relies on; and the reader of sources, which judges others, is right."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import vllm

from mixquant.integrations.vllm.runner import HOOKS
from tests.integrations.vllm.versions import SIGNATURES, Need, lacks, main, needs

INSTALLED = Path(vllm.__file__).parents[1]


def test_the_installed_version_has_all():
    assert {str(need): lacks(INSTALLED, need) for need in needs() if lacks(INSTALLED, need)} == {}


def test_every_wrapped_method_has_its_signature():
    assert {f"{module}:{owner}.{name}" for module, owner, name in HOOKS} <= set(SIGNATURES)


@pytest.mark.parametrize("key", SIGNATURES)
def test_signatures_as_python_sees_them(key):
    """Of the loaded classes, hooks' too: a wrapper keeps the signature of what it wraps."""
    module, _, name = key.partition(":")
    found: object = importlib.import_module(module)
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    function = found.__func__ if isinstance(found, classmethod | staticmethod) else found
    parameters = list(inspect.signature(function).parameters)  # type: ignore[arg-type]
    leading, _, anywhere = " ".join(SIGNATURES[key]).partition("*")
    assert parameters[: len(leading.split())] == leading.split()
    assert set(anywhere.split()) <= set(parameters)


@pytest.mark.parametrize(
    ("need", "answer"),
    [
        (Need("vllm.no_such_module", "Anything"), "missing"),
        (Need("vllm.v1.engine.core", "NoSuchClass.method"), "no NoSuchClass"),
        (Need("vllm.v1.engine.core", "EngineCore.no_such_method"), "missing"),
        (Need("vllm.v1.engine.core", "EngineCore.preprocess_add_request", ("self", "call")), "(self, request)"),
        (Need("vllm.v1.engine.core", "EngineCore.vllm_config", ("self",)), "not a function"),
    ],
)
def test_what_is_missing_is_named(need, answer):
    assert lacks(INSTALLED, need) == answer


def test_the_command_fails_where_something_is_missing(tmp_path, capsys):
    (tmp_path / "vllm").mkdir()
    assert main([INSTALLED]) == 0
    assert main([INSTALLED, tmp_path]) == 1
    assert "| `v1.engine.core:EngineCore.preprocess_add_request(self, request)` | yes | **no EngineCore** |" in (
        capsys.readouterr().out
    )
