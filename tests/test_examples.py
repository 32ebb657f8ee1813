"""The recipes under examples/, as far as they run without a cluster."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mixquant import cli
from mixquant.checkpoint.locate import DEMO
from mixquant.errors import InputError
from mixquant.integrations.vllm import facts

EXAMPLES = Path(__file__).parents[1] / "examples"


def commands() -> list[list[str]]:
    """What the manifest's containers run."""
    documents = yaml.safe_load_all((EXAMPLES / "kubernetes-pair.yaml").read_text())
    pods = [document["spec"]["template"]["spec"] for document in documents if "template" in document["spec"]]
    return [container["command"] for pod in pods for container in pod["containers"]]


def test_the_manifests_commands_are_ours() -> None:
    """Their options are known, none is left for vLLM, and each server's names of the others are those of its pods."""
    group: Any = typer.main.get_command(cli.app)
    serve = group.commands["serve"]
    found = []
    for program, name, *arguments in commands():
        assert (program, name) == ("mixquant", "serve")
        context = serve.make_context("serve", list(arguments))
        assert context.args == []
        found.append(context.params)
    prefill, decode, router = found
    assert [params["role"] for params in found] == ["prefill", "decode", "router"]
    assert prefill["prefill"] == decode["prefill"] == "fp8"
    assert router["prefill_url"] == ["http://prefill-0.prefill:8000", "http://prefill-1.prefill:8000"]
    assert router["decode_url"] == ["http://decode-0.decode:8000"]
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes-pair.yaml").read_text()))
    replicas = {d["metadata"]["name"]: d["spec"]["replicas"] for d in documents if d["kind"] == "StatefulSet"}
    assert replicas == {"prefill": 2, "decode": 1}


@pytest.mark.slow
def test_both_sides_of_the_ray_recipe_fit_each_other() -> None:
    """vLLM's own configurations of its arguments, which start no engine; and of another format, which do not fit."""
    pytest.importorskip("nixl")
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    from examples.ray_pair import engine_kwargs

    def said(role: str, prefill: str) -> facts.Facts:
        arguments = arg_utils.AsyncEngineArgs(model=str(DEMO), **engine_kwargs("demo", role, prefill))
        return facts.of(arguments.create_engine_config(), Namespace(chat_template=None, served_model_name=["demo"]))

    facts.compare({"http://a": said("prefill", "nvfp4"), "http://b": said("decode", "nvfp4")})
    with pytest.raises(InputError, match="differ in the prefill policy"):
        facts.compare({"http://a": said("prefill", "nvfp4"), "http://b": said("decode", "int8")})
