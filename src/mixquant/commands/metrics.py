"""One page for Prometheus: the metrics of all processes of a pair, gathered when it is asked for.

Every sample keeps its name and gets two labels more, `role` (prefill, decode or router) and `server` (prefill-1), so
that `sum by (role)` and the like do what they do with servers that Prometheus asks one by one. Beside them stand, for
each process, whether it answers and how often it was started again.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from mixquant.commands.processes import Process

LABELS = ("role", "server")
TIMEOUT_SECONDS = 5
"""Prometheus itself gives up a page after 10 seconds by default."""


class Gathered(Collector):
    """What a pair's processes say at their own /metrics."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self.processes = processes

    def collect(self) -> Iterator[Metric]:
        """One family for each name; a process that does not answer is down, and the others are shown."""
        up = GaugeMetricFamily("mixquant_server_up", "Whether a process of the pair answers.", labels=LABELS)
        restarts = CounterMetricFamily(
            "mixquant_server_restarts", "How often a process of the pair ended and was started again.", labels=LABELS
        )
        families: dict[str, Metric] = {}
        with ThreadPoolExecutor(len(self.processes)) as pool:
            for process, page in zip(self.processes, pool.map(_read, self.processes), strict=True):
                labels = {"role": process.role, "server": process.log.stem}
                up.add_metric(list(labels.values()), page is not None)
                restarts.add_metric(list(labels.values()), process.restarts)
                for family in text_string_to_metric_families(page or ""):
                    merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                    for sample in family.samples:
                        merged.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
        yield from (up, restarts, *families.values())


def publish(processes: Sequence[Process], host: str, port: int) -> None:
    """Serve the page at /metrics from now on, in a thread of this process; OSError where the address is taken."""
    registry = CollectorRegistry()
    registry.register(Gathered(processes))
    start_http_server(port, host, registry)


def _read(process: Process) -> str | None:
    try:
        with urllib.request.urlopen(process.metrics, timeout=TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode())
    except OSError:
        return None
