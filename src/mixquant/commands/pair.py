"""`mixquant serve MODEL --prefill-servers N --decode-servers M`: a pair on one machine behind one OpenAI endpoint.

    router             vLLM's own (vllm-router), at --host and --port: asks a prefill server for one token, then a
                       decode server for the answer
    prefill server 1   `mixquant serve MODEL --role prefill`, at a free port of 127.0.0.1
    decode server 1    `mixquant serve MODEL --role decode`, the same

Over several machines, servers are started by their roles, and `--role router` is the router alone (`route`).

Every process has a log file, and the metrics of all stand on one page (`metrics`). The router starts once all servers
are healthy and have said that they fit each other. A process that ends later is started again; one that ends before it
was healthy ends all. Answers that were on their way through it end in an error, which its client may send again.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

from mixquant.checkpoint.locate import find
from mixquant.commands import handover, router
from mixquant.commands.processes import POLL_SECONDS, Process, await_health, stop_all
from mixquant.errors import InputError
from mixquant.integrations.vllm import facts, pair
from mixquant.packages import require

LOOPBACK = "127.0.0.1"
UNASSIGNED = range(20_000, 32_000)
"""Ports below those that outgoing connections get."""

EVERYWHERE = ("0.0.0.0", "::")

UCX_LOOPBACK = {"UCX_TLS": "tcp,self,shm", "UCX_NET_DEVICES": "lo"}
"""Without GPUs, KV moves through this machine's memory, where UCX must not look for a network card."""

ROUTER_OPTIONS = (
    "--vllm-pd-disaggregation", "--kv-connector", "nixl", "--health-check-interval-secs", "5",
    "--health-success-threshold", "1", "--cb-timeout-duration-secs", "5",
)  # fmt: skip
"""A server that has been started again gets requests within seconds: it is ready once it answers at /health, and after
ten failures in a row the router leaves a server alone for 5 seconds, and not for its usual minute."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for on the command line. policy: the fields of a `Policy` that were given; options: what comes
    after --, for vLLM's servers, or for the router where that is all that is started."""

    model: str
    policy: Mapping[str, Any]
    options: Sequence[str]
    host: str
    port: int
    metrics_port: int
    prefill_servers: int = 0
    decode_servers: int = 0
    role: str | None = None
    prefill_urls: Sequence[str] = ()
    decode_urls: Sequence[str] = ()


def start(asked: Asked) -> None:
    """A pair, or the router of one; InputError where the options do not fit each other."""
    counted, named = asked.prefill_servers or asked.decode_servers, asked.prefill_urls or asked.decode_urls
    if counted and asked.role is not None:
        raise InputError("--role is for one server: leave it out, or leave out --prefill-servers and --decode-servers.")
    if counted and named:
        raise InputError(
            "--prefill-url and --decode-url are for --role router, which starts no servers: leave them out."
        )
    if counted:
        run(asked)
    elif asked.role == "router":
        route(asked)
    else:
        raise InputError("--prefill-url and --decode-url are for --role router: add it, or leave them out.")


def run(asked: Asked) -> None:
    """Serve until interrupted. InputError where the pair cannot be, or one of its processes ends at its start."""
    addresses = _check(asked)
    from mixquant.commands import metrics  # reads Prometheus' format by a package that comes with vLLM

    servers = list(_servers(asked, Path(tempfile.mkdtemp(prefix="mixquant-pair-"))))
    processes = list(servers)
    _end_by_signals()
    try:
        for server in servers:
            server.start()
            _say(f"{server.name} starts; its log is {server.log}.")
        await_health(servers, _say)
        said = {server.url: facts.ask(server.url) for server in servers}
        _check_servers(asked, said)
        front = _router(asked, servers)
        processes.append(front)
        for address in addresses:
            address.close()
        front.start()
        await_health([front], lambda _: None)
        metrics.publish(processes, asked.host, asked.metrics_port)
        _say(f"{asked.model} is served at http://{asked.host}:{asked.port}/v1; the router's log is {front.log}.")
        _say(f"All servers' metrics are at http://{asked.host}:{asked.metrics_port}/metrics.")
        _watch(processes)
    except KeyboardInterrupt:
        _say("Stopping.")
    finally:
        for address in addresses:
            address.close()
        stop_all(processes)


def route(asked: Asked) -> None:
    """Become vLLM's router before servers that run already. InputError where one of them does not answer, or does not
    fit the others."""
    urls = {"prefill": list(map(_url, asked.prefill_urls)), "decode": list(map(_url, asked.decode_urls))}
    if not all(urls.values()):
        raise InputError("A router needs both: name each server by --prefill-url or --decode-url.")
    require("vllm_router")
    for address in _addresses(asked):
        address.close()
    said = {url: facts.ask(url) for named in urls.values() for url in named}
    for role, named in urls.items():
        for url in named:
            if said[url].role != role:
                raise InputError(f"{url} is a {said[url].role} server: name it by --{said[url].role}-url.")
    first = urls["prefill"][0]
    if asked.model not in (served := said[first].served_as):
        raise InputError(f"{first} serves {', '.join(served)} and not {asked.model}: name that.")
    _check_servers(asked, said)
    command = _router_command(asked, urls, (asked.host, asked.metrics_port)) + list(asked.options)
    os.execve(command[0], command, {**os.environ, **_router_key(asked)})


def _url(given: str) -> str:
    """A server's URL as others are joined to it. Raises InputError for what is none."""
    try:
        parts = urlsplit(given)
        complete = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # a port that is no number, as the end of an IPv6 address without its brackets
        complete = False
    if not complete:
        raise InputError(f"{given} is no URL of a server: write http://10.0.0.1:8001, or http://[fd00::1]:8001.")
    return given.rstrip("/")


def _check_servers(asked: Asked, said: Mapping[str, facts.Facts]) -> None:
    """Before the first request: whether all fit, and a hand-over between each two."""
    facts.compare(said)
    prefill, decode = ([url for url, found in said.items() if found.role == role] for role in pair.ROLES)
    handover.try_all(prefill, decode, said[prefill[0]].served_as[0], asked.options)


def _check(asked: Asked) -> list[socket.socket]:
    """Raise InputError for what can be told before anything starts; the addresses of the router and of the metrics,
    held until it starts."""
    if not (asked.prefill_servers and asked.decode_servers):
        raise InputError("A pair has both: name --prefill-servers and --decode-servers.")
    pair.check_options(asked.options)
    for package in ("vllm", "vllm_router", "nixl"):
        require(package)
    pair.prefill_policy(asked.policy, find(asked.model))
    return _addresses(asked)


def _addresses(asked: Asked) -> list[socket.socket]:
    """The addresses of the requests and of the metrics, held."""
    if asked.metrics_port == asked.port:
        raise InputError(f"Port {asked.port} is for the requests: choose another with --metrics-port.")
    return [reserve(asked.host, asked.port), reserve(asked.host, asked.metrics_port, "--metrics-port")]


def reserve(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket that holds an address, so that nobody else gets it. Raises InputError where it cannot be had; `option`
    is what names another port."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        return held
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"Port {port} is taken: choose another with {option}.") from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise InputError(f"Port {port} is for the system alone: choose one above 1023 with {option}.") from None
        raise InputError(
            f"{host} is no address of this machine: choose another with --host, such as {LOOPBACK}."
        ) from None


def _servers(asked: Asked, logs: Path) -> Iterator[Process]:
    """The prefill servers, then the decode servers, each with its share of the GPUs."""
    roles = ["prefill"] * asked.prefill_servers + ["decode"] * asked.decode_servers
    shares = _gpus(asked, len(roles))
    ports = free_ports(2 * len(roles))
    for place, role in enumerate(roles):
        number = roles[: place + 1].count(role)
        port, side_channel = ports[2 * place : 2 * place + 2]
        yield Process(
            f"prefill server {number}" if role == "prefill" else f"decode server {number}",
            _command(asked, role, port),
            f"http://{LOOPBACK}:{port}",
            logs / f"{role}-{number}.log",
            shares[place] | {"VLLM_NIXL_SIDE_CHANNEL_HOST": LOOPBACK, "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side_channel)},
        )


def _command(asked: Asked, role: str, port: int) -> list[str]:
    policy: list[str] = []
    for name, value in asked.policy.items():
        option = f"--{name.replace('_', '-')}"
        policy += [option] if value is True else [option, str(value)]
    own = ["--role", role, *policy, "--host", LOOPBACK, "--port", str(port)]
    return [sys.executable, "-m", "mixquant", "serve", asked.model, *own, "--", *asked.options]


def _router(asked: Asked, servers: Sequence[Process]) -> Process:
    urls = {role: [s.url for s in servers if s.name.startswith(role)] for role in pair.ROLES}
    (own,) = free_ports(1)
    command = _router_command(asked, urls, (LOOPBACK, own))
    host = LOOPBACK if asked.host in EVERYWHERE else asked.host
    log = servers[0].log.with_name("router.log")
    metrics = f"http://{LOOPBACK}:{own}/metrics"
    return Process("router", command, f"http://{host}:{asked.port}", log, _router_key(asked), metrics)


def _router_command(asked: Asked, urls: Mapping[str, Sequence[str]], metrics: tuple[str, int]) -> list[str]:
    """metrics: the host and port of the router's own."""
    address = ["--host", asked.host, "--port", str(asked.port)]
    address += ["--prometheus-host", metrics[0], "--prometheus-port", str(metrics[1])]
    servers = [part for role in pair.ROLES for url in urls[role] for part in (f"--{role}", url)]
    launcher = ["vllm_router.launch_router"]
    if handover.api_key(asked.options):
        launcher = [router.__name__, f"{urls['decode'][0]}/v1/models"]
    return [sys.executable, "-m", *launcher, *ROUTER_OPTIONS, *address, *servers]


def _router_key(asked: Asked) -> dict[str, str]:
    """The environment with the servers' key, or with none: nobody's key for OpenAI is sent to them."""
    return {router.KEY: handover.api_key(asked.options) or ""}


def _gpus(asked: Asked, servers: int) -> list[dict[str, str]]:
    """The environment that gives each server its own GPUs; without GPUs, what lets UCX do without them."""
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        return [{name: os.environ.get(name, value) for name, value in UCX_LOOPBACK.items()}] * servers
    from mixquant.integrations.vllm.server import parse

    arguments = parse([find(asked.model).served, *asked.options])
    each = arguments.tensor_parallel_size * arguments.pipeline_parallel_size
    if servers * each > count:
        raise InputError(
            f"{asked.prefill_servers} prefill and {asked.decode_servers} decode servers of {each} GPU(s) each need "
            f"{servers * each} GPUs, and this machine has {count}: ask for fewer servers, or spread them over several "
            "machines with --role."
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": ",".join(visible[each * i : each * (i + 1)])} for i in range(servers)]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody has now, and that the system gives to nobody by itself: servers listen there
    only once they have loaded their model."""
    ports: list[int] = []
    for port in random.sample(UNASSIGNED, len(UNASSIGNED)):
        with suppress(OSError), socket.socket() as probe:
            probe.bind((LOOPBACK, port))
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def _watch(processes: Sequence[Process]) -> None:
    """Start again what ends, until interrupted."""
    starting: list[Process] = []
    while True:
        for process in processes:
            if process.code is not None and process in starting:
                raise InputError(*f"{process.name}, started again, {process.last_words()}".split("\n", 1))
            if process.code is not None:
                _say(f"{process.name} {process.last_words()}\n{process.name} starts again.")
                process.start()
                starting.append(process)
            elif process in starting and process.is_healthy():
                starting.remove(process)
                _say(f"{process.name} is ready again at {process.url}.")
        time.sleep(POLL_SECONDS)


def _end_by_signals() -> None:
    """SIGTERM ends the command as Ctrl-C does; once it is ending, neither disturbs it."""

    def end(number: int, frame: FrameType | None) -> None:
        for ignored in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ignored, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def _say(line: str) -> None:
    print(f"mixquant: {line}", file=sys.stderr, flush=True)
