"""`mixquant serve demo --prefill-servers N --decode-servers M` as real processes: vLLM, NIXL on the loopback, a router.

The servers compute in float32, where kernel noise is far below what quantization does, and in blocks of 32 tokens.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from mixquant.commands.handover import WANTED
from tests.commandline import MIXQUANT
from tests.servers import free_port

START_SECONDS = 600
OPTIONS = (
    "--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-num-batched-tokens", "512",
    "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(256 << 20),
)  # fmt: skip
POLICY = {"prefill": "nvfp4", "tail": 1}
NETWORK = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo"}
"""KV takes the network, as between two machines; else a decode server reads the memory of a prefill server itself."""


@dataclass(frozen=True)
class Answer:
    """What a client got: the HTTP status, and tokens with their log-probabilities, or the error's text."""

    status: int
    tokens: list[int]
    logprobs: list[float]
    error: str = ""


@dataclass(frozen=True)
class Pair:
    """A running pair: its one address, the process that was started, and what that says."""

    url: str
    process: subprocess.Popen[bytes]
    said: Path

    def ask(self, prompt: str, new_tokens: int, timeout: float = 240, **options: Any) -> Answer:
        """A greedy completion."""
        return ask(self.url, prompt, new_tokens, timeout, **options)

    def try_again(self, prompt: str, new_tokens: int, timeout: float) -> Answer | None:
        """The same; None where nobody listens. A timeout is an error of the test."""
        try:
            return self.ask(prompt, new_tokens, timeout)
        except ConnectionError:
            return None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise
            return None

    @contextmanager
    def stream(self, prompt: str, new_tokens: int, timeout: float = 240) -> Iterator[Iterator[dict[str, Any]]]:
        """The pieces of a completion as they come; the connection ends with the block."""
        with urllib.request.urlopen(_request(self.url, prompt, new_tokens, stream=True), timeout=timeout) as answer:
            lines = (line.removeprefix(b"data: ").strip() for line in answer)
            yield (json.loads(line) for line in lines if line.startswith(b"{"))

    def log(self, name: str) -> str:
        """What a process says, such as "decode-1"."""
        found = re.search(r"its log is (.*)/prefill-1\.log", self.said.read_text())
        assert found is not None
        return (Path(found[1]) / f"{name}.log").read_text()

    def metrics(self) -> list[Sample]:
        """The samples of all servers, from their one page."""
        (page,) = re.findall(r"metrics are at (\S+)\.$", self.said.read_text(), re.MULTILINE)
        with urllib.request.urlopen(page, timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return [sample for family in families for sample in family.samples]

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of a name with these labels."""
        found = [s.value for s in self.metrics() if s.name == name and labels.items() <= s.labels.items()]
        assert found, name
        return sum(found)

    def server(self, name: str) -> str:
        """The URL of a server, such as "decode server 1"."""
        return re.findall(rf"{name} is ready at (\S+)\.$", self.said.read_text(), re.MULTILINE)[0]

    def child(self, port: str) -> psutil.Process:
        """The process that listens there."""
        for child in psutil.Process(self.process.pid).children():
            if any(c.status == psutil.CONN_LISTEN and str(c.laddr.port) == port for c in child.net_connections()):
                return child
        raise AssertionError(f"nobody listens at {port}")

    def child_of(self, name: str) -> psutil.Process:
        """The process of a server, or of the "router"; AssertionError while it does not listen."""
        return self.child((self.url if name == "router" else self.server(name)).rpartition(":")[2])

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to a server and all that it has started, or to the "router"."""
        os.killpg(self.child_of(name).pid, number)


def ask(url: str, prompt: str, new_tokens: int, timeout: float = 240, **options: Any) -> Answer:
    """A greedy completion by the router or a server."""
    try:
        with urllib.request.urlopen(_request(url, prompt, new_tokens, **options), timeout=timeout) as answer:
            (choice,) = json.load(answer)["choices"]
    except urllib.error.HTTPError as error:
        return Answer(error.code, [], [], error.read().decode())
    return Answer(200, choice["token_ids"], choice["logprobs"]["token_logprobs"])


def _request(url: str, prompt: str, new_tokens: int, **options: Any) -> urllib.request.Request:
    asked = {"model": "demo", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "logprobs": 1}
    body = json.dumps({**asked, "ignore_eos": True, "return_token_ids": True, **options}).encode()
    return urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})


@contextmanager
def running(folder: Path, *options: str, prefill: int = 1, decode: int = 1) -> Iterator[Pair]:
    """A pair from its start until it has stopped, which it must do cleanly."""
    said, port = folder / "said", free_port()
    counts = ("--prefill-servers", str(prefill), "--decode-servers", str(decode))
    address = ("--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(free_port()))
    command = [*MIXQUANT, "serve", "demo", "--prefill", "nvfp4", *counts, *address, "--", *OPTIONS]
    with said.open("wb") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, env=environment())
    pair = Pair(f"http://127.0.0.1:{port}", process, said)
    try:
        wait_for(lambda: "is served at" in said.read_text() or process.poll() is not None)
        if process.poll() is not None:
            pytest.fail(said.read_text()[-6000:])
        yield pair
    finally:
        children = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0, said.read_text()
    psutil.wait_procs(children, timeout=10)
    assert [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE] == []


@contextmanager
def router(prefill: str, decode: str) -> Iterator[Pair]:
    """`mixquant serve demo --role router` before two servers."""
    port = free_port()
    urls = ("--prefill-url", prefill, "--decode-url", decode)
    address = ("--host", "127.0.0.1", "--port", str(port), "--metrics-port", str(free_port()))
    command = [*MIXQUANT, "serve", "demo", "--role", "router", *urls, *address]
    url = f"http://127.0.0.1:{port}"
    with started(command, url, Path(os.devnull)) as process:
        yield Pair(url, process, Path(os.devnull))


@contextmanager
def started(command: list[str], url: str, log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process from ready to gone."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment() | variables, start_new_session=True
        )

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return bool(urllib.request.urlopen(f"{url}/health").status == 200)
        except OSError:
            return False

    try:
        wait_for(answers)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(prefill: str, prompt: str) -> dict[str, Any]:
    """Let a prefill server read a prompt; where its KV is. The first half of a router's work."""
    with urllib.request.urlopen(_request(prefill, prompt, 1, kv_transfer_params=dict(WANTED)), timeout=240) as answer:
        return dict(json.load(answer)["kv_transfer_params"])


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return kept | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | NETWORK


def wait_for(ready: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)
