"""Machines for tests: network namespaces with a loopback of their own, each by a cable at one bridge.

    reads     10.77.0.1    the prefill server
    writes    10.77.0.2    the decode server
    routes    10.77.0.3    the router
    asks      10.77.0.254  the bridge itself; the test's own process moves there

What one of them has on its loopback, or announces of it, the others cannot reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

DEVICE = "eth0"
"""The cable's end at a machine."""

UCX = {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": DEVICE}
"""KV takes the cable: machines that are namespaces of one kernel could share memory, and UCX would find that out."""

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A machine, by its name and its number in the network."""

    name: str
    number: int

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    @property
    def namespace(self) -> str:
        return f"mixquant-{os.getpid()}-{self.name}"

    @property
    def port(self) -> str:
        """Its cable's end at the bridge."""
        return f"port{self.number}"

    def command(self, *command: str) -> list[str]:
        """What runs a command there."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def sent(self) -> int:
        """Bytes that have left it by its cable."""
        (link,) = json.loads(_ip(f"-n {self.namespace} -json -statistics link show {DEVICE}"))
        return int(link["stats64"]["tx"]["bytes"])


READS, WRITES, ROUTES = HOSTS = (Host("reads", 1), Host("writes", 2), Host("routes", 3))
ASKS = Host("asks", 254)


def missing() -> str:
    """Why there can be no machines here; nothing where there can."""
    if shutil.which("ip") is None:
        return "`ip` is not installed: apt-get install iproute2"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    try:
        with network():
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.decode().strip()}"


@contextlib.contextmanager
def network() -> Iterator[None]:
    """The machines, connected. This process is at `ASKS` meanwhile, and so is all that it starts."""
    try:
        for host in (ASKS, *HOSTS):
            _ip(f"netns add {host.namespace}")
            _ip(f"-n {host.namespace} link set lo up")
        _at(ASKS, "link add bridge type bridge")
        _at(ASKS, f"address add {ASKS.address}/24 dev bridge")
        _at(ASKS, "link set bridge up")
        for host in HOSTS:
            _at(ASKS, f"link add {host.port} type veth peer name {DEVICE} netns {host.namespace}")
            _at(ASKS, f"link set {host.port} master bridge up")
            _at(host, f"address add {host.address}/24 dev {DEVICE}")
            _at(host, f"link set {DEVICE} up")
        with _moved(ASKS):
            yield
    finally:
        for host in (*HOSTS, ASKS):
            subprocess.run(["ip", "netns", "delete", host.namespace], capture_output=True)


@contextlib.contextmanager
def _moved(host: Host) -> Iterator[None]:
    """This thread's network is that of a machine, and so is that of threads and processes that it starts."""
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{host.namespace}") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(namespace: int) -> None:
    """os.setns, which Python has from 3.12 on."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextlib.contextmanager
def cut(one: Host, other: Host) -> Iterator[None]:
    """No way between two machines; both reach all others. Nobody is told: what is sent is lost."""
    ports = (one.port, other.port)
    try:
        for port in ports:
            _at(ASKS, f"link set {port} type bridge_slave isolated on")
        yield
    finally:
        for port in ports:
            _at(ASKS, f"link set {port} type bridge_slave isolated off")


@contextlib.contextmanager
def closed(host: Host, port: int) -> Iterator[None]:
    """As behind a firewall that drops what comes to a TCP port: the machine's answers are dropped."""
    rule = f"ipproto tcp sport {port} blackhole"
    _at(host, f"rule add {rule}")
    try:
        yield
    finally:
        _at(host, f"rule delete {rule}")


def _at(host: Host, arguments: str) -> None:
    _ip(f"-n {host.namespace} {arguments}")


def _ip(arguments: str) -> bytes:
    """What `ip` prints. Raises CalledProcessError, with what it says."""
    return subprocess.run(["ip", *arguments.split()], check=True, capture_output=True).stdout
