"""`mixquant serve demo` as one real server process, which all tests that need a server share.

It serves in float32, where kernel noise is far below what quantization does, and with a tail of three.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.commandline import MIXQUANT

TAIL = 3
START_SECONDS = 240
OPTIONS = (
    "--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "1024", "--no-enable-prefix-caching",
    "--kv-cache-memory-bytes", str(1 << 28), "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running server: its address, and the file with all that it says."""

    url: str
    log: Path

    def client(self) -> Any:
        """An `openai.OpenAI`."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            return str(answer.read().decode())

    def counters(self) -> dict[str, float]:
        """Our counters by their short names."""
        found = re.findall(
            r'^mixquant_(\w+)_total\{engine="0",model_name="demo"\} (\S+)$', self.metrics(), re.MULTILINE
        )
        return {name: float(value) for name, value in found}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one server of a session: whoever counts what it did takes differences."""
    pytest.importorskip("vllm")
    pytest.importorskip("openai")
    server = Server(f"http://127.0.0.1:{free_port()}", tmp_path_factory.mktemp("serve") / "log")
    with running(server):
        yield server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(server: Server) -> Iterator[None]:
    """The server's process, from ready to gone."""
    port = server.url.rpartition(":")[2]
    policy = ("--prefill", "nvfp4", "--tail", str(TAIL))
    command = [*MIXQUANT, "serve", "demo", *policy, "--host", "127.0.0.1", "--port", port, "--", *OPTIONS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with server.log.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_until_ready(process, server)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.url}/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"The server did not start:\n{server.log.read_text()[-4000:]}")
