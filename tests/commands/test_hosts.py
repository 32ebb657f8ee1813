"""A pair on three machines, by the commands of docs/pair.md: network namespaces, KV over the wire, servers with a key.

What an address of the loopback would hide is seen here: each machine reaches the others at their addresses alone. A
link is cut while clients ask: they get errors that they may send again, within seconds, and then the right tokens.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mixquant.commands.processes import Process
from mixquant.integrations.vllm import facts
from mixquant.integrations.vllm.nixl import EXPIRES
from tests import hosts, pairs
from tests.commandline import MIXQUANT, refuse
from tests.commands.test_pair import NEW_TOKENS, PROMPTS, check, difference, single_engine
from tests.hosts import READS, ROUTES, WRITES
from tests.integrations.vllm.engines import CONTROL
from tests.pairs import POLICY, Answer, Pair

pytest.importorskip("vllm")
pytest.importorskip("nixl")
pytest.importorskip("vllm_router")

pytestmark = pytest.mark.slow

REQUESTS = 16
CLIENTS = 4
RETRY_SECONDS = 30
RETRIABLE = (500, 503)
NIXL_PORT = 5600
KEY = {"VLLM_API_KEY": "of the test"}
PREFILL, DECODE, ROUTER = (
    f"http://{READS.address}:8001",
    f"http://{WRITES.address}:8001",
    f"http://{ROUTES.address}:8000",
)
NAMED = ("--prefill-url", PREFILL, "--decode-url", DECODE, "--port", "8000")
FLOAT32 = 4


@dataclass(frozen=True)
class Servers:
    """A prefill and a decode server, each on its machine."""

    logs: Path
    reading: int
    """The prefill server's process."""


@pytest.fixture(scope="module", autouse=True)
def _machines() -> None:
    if why_not := hosts.missing():
        pytest.skip(why_not)


@pytest.fixture(scope="module")
def expected() -> list[Answer]:
    return single_engine(POLICY)[:REQUESTS]


@pytest.fixture(scope="module")
def servers(expected: list[Answer], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Both start at once; from here on, this process is on the network of the three machines, with the key."""
    logs = tmp_path_factory.mktemp("hosts")
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.enter_context(hosts.network())
        stack.callback(urllib.request.install_opener, urllib.request.build_opener())
        opener = urllib.request.build_opener()
        opener.addheaders = [("authorization", f"Bearer {KEY['VLLM_API_KEY']}")]
        urllib.request.install_opener(opener)
        patch.setenv(*next(iter(KEY.items())))
        starts = [
            pairs.started(
                host.command(*MIXQUANT, "serve", "demo", "--role", role, "--prefill", "nvfp4", "--host", host.address,
                             "--port", "8001", "--", *pairs.OPTIONS),
                url, logs / f"{role}.log", **KEY, **hosts.UCX,
            )
            for host, role, url in ((READS, "prefill", PREFILL), (WRITES, "decode", DECODE))
        ]  # fmt: skip
        with ThreadPoolExecutor(len(starts)) as pool:
            reading, _ = pool.map(stack.enter_context, starts)
        yield Servers(logs, reading.pid)


@pytest.fixture(scope="module")
def pair(servers: Servers) -> Iterator[Pair]:
    """The same behind a router."""
    log = servers.logs / "router.log"
    command = ROUTES.command(*MIXQUANT, "serve", "demo", "--role", "router", *NAMED)
    with pairs.started(command, ROUTER, log, **KEY) as process:
        yield Pair(ROUTER, process, log)


def test_a_firewall_before_nixl_is_found_before_clients_come(servers: Servers) -> None:
    """Nobody has shaken hands yet. And so is a key that the servers do not know."""
    with hosts.closed(READS, NIXL_PORT):
        said = refuse("serve", "demo", "--role", "router", *NAMED)
    assert f"The first hand-over of KV from {PREFILL} to {DECODE} failed" in said
    assert f"let the decode server's machine reach NIXL at {READS.address}:{NIXL_PORT}" in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", "another")
        assert f"{PREFILL} asks for a key: set VLLM_API_KEY" in refuse("serve", "demo", "--role", "router", *NAMED)


def test_three_machines_answer_as_one_engine_and_kv_crosses_the_wire(pair: Pair, expected: list[Answer]) -> None:
    read = facts.ask(PREFILL)
    token = 2 * read.layers * read.kv_heads * read.head_size * FLOAT32
    kv = token * sum(len(prompt.split()) for prompt in PROMPTS[:REQUESTS])  # a word is at least a token
    sent, fetched = READS.sent(), fetched_bytes()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(lambda place: ask(pair, place, "alone"), range(REQUESTS)))
    check(found, expected)
    assert fetched_bytes() - fetched >= kv
    assert READS.sent() - sent >= fetched_bytes() - fetched


def test_control_the_decode_machine_alone_answers_otherwise(pair: Pair, expected: list[Answer]) -> None:
    """It reads the prompt in BF16, and nothing is fetched."""
    sent = READS.sent()
    alone = pairs.ask(DECODE, PROMPTS[1], NEW_TOKENS, cache_salt="control")
    assert difference(alone, expected[1]) > CONTROL
    assert READS.sent() - sent < FLOAT32 * 2**10


def test_the_router_asks_for_the_key_and_shows_its_metrics(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its health too: who started it knows it to be healthy all the same."""
    headers = {"content-type": "application/json", "authorization": "Bearer another"}
    asked = json.dumps({"model": "demo", "prompt": PROMPTS[0], "max_tokens": 1}).encode()
    with pytest.raises(HTTPError, match="401"):
        urllib.request.urlopen(
            urllib.request.Request(f"{ROUTER}/v1/completions", asked, headers), timeout=RETRY_SECONDS
        )
    monkeypatch.setattr(urllib.request, "_opener", None)  # the one with the key
    assert Process("router", (), ROUTER, pair.said).is_healthy()
    page = urllib.request.urlopen(f"http://{ROUTES.address}:8001/metrics", timeout=RETRY_SECONDS).read().decode()
    assert f'vllm_router_worker_health{{worker="{PREFILL}"}} 1' in page


def test_kv_that_comes_after_its_lease_is_not_used(servers: Servers, expected: list[Answer]) -> None:
    """The prefill server stands still meanwhile; vLLM would use what comes, whoever has got the blocks by then."""
    for lease, status in ((2, 500), (RETRY_SECONDS, 200)):
        where = pairs.read(PREFILL, PROMPTS[7]) | {EXPIRES: time.time() + lease}
        assert where["remote_host"] == READS.address
        with ThreadPoolExecutor(1) as pool:
            os.killpg(servers.reading, signal.SIGSTOP)
            try:
                salt = f"lease {lease}"
                asked = pool.submit(
                    pairs.ask, DECODE, PROMPTS[7], NEW_TOKENS, kv_transfer_params=where, cache_salt=salt
                )
                time.sleep(lease + 1 if status == 500 else 1)
            finally:
                os.killpg(servers.reading, signal.SIGCONT)
            assert asked.result().status == status
            assert asked.result().tokens == (expected[7].tokens if status == 200 else [])


def test_nobody_gets_a_wrong_token_or_waits_when_a_link_is_cut(pair: Pair, expected: list[Answer]) -> None:
    """Between the two servers, so that no health check sees it, until every client has got an error."""
    clients = Clients(pair, expected)
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(clients.run, number) for number in range(CLIENTS)]
        try:
            pairs.wait_for(lambda: clients.right >= CLIENTS, RETRY_SECONDS)
            with hosts.cut(READS, WRITES):
                pairs.wait_for(lambda: len(clients.failed) == CLIENTS, RETRY_SECONDS)
            before = clients.right
            pairs.wait_for(lambda: clients.right >= before + REQUESTS, RETRY_SECONDS)
        finally:
            clients.stopped.set()
        for task in asking:
            task.result()


@dataclass
class Clients:
    """Clients that ask on and on, each for KV that nobody has in a cache. failed: who has got an error."""

    pair: Pair
    expected: list[Answer]
    right: int = 0
    failed: set[int] = field(default_factory=set)
    stopped: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, number: int) -> None:
        """One of them. A wrong token is an error of the test, and so is waiting, or an error that one may not send
        again."""
        place = number
        while not self.stopped.is_set():
            place = (place + CLIENTS) % REQUESTS
            answer = ask(self.pair, place, f"{number} {time.monotonic()}")
            with self.lock:
                self.right += answer.status == 200
            if answer.status == 200:
                assert answer.tokens == self.expected[place].tokens
            else:
                assert answer.status in RETRIABLE, answer
                self.failed.add(number)
                self.stopped.wait(0.2)


def ask(pair: Pair, place: int, salt: str) -> Answer:
    """Whoever waits longer has a TimeoutError, and the test too."""
    return pair.ask(PROMPTS[place], NEW_TOKENS, timeout=RETRY_SECONDS, cache_salt=f"{salt} {place}")


def fetched_bytes() -> float:
    """KV that the decode server has got, as it says itself."""
    page = urllib.request.urlopen(f"{DECODE}/metrics", timeout=RETRY_SECONDS).read().decode()
    samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
    return sum(sample.value for sample in samples if sample.name == "vllm:nixl_bytes_transferred_sum")
