"""The page with the metrics of all of a pair's processes, of real Prometheus pages; test_pair.py reads a pair's own."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.parser import text_string_to_metric_families

from mixquant.commands import metrics
from mixquant.commands.processes import Process
from tests.servers import free_port


@pytest.fixture
def servers() -> Iterator[list[Process]]:
    """Two that answer and one that does not, as `mixquant serve` names them."""
    started, found = [], []
    for number, name in enumerate(("prefill server 1", "decode server 1")):
        registry, port = CollectorRegistry(), free_port()
        Counter("tokens", "Tokens.", ["model_name"], registry=registry).labels("demo").inc(10 * (number + 1))
        Histogram("seconds", "Seconds.", buckets=[1, 2], registry=registry).observe(1.5)
        started.append(start_http_server(port, "127.0.0.1", registry))
        found.append(Process(name, [], f"http://127.0.0.1:{port}", Path(f"{name.split()[0]}-1.log")))
    yield [*found, Process("router", [], f"http://127.0.0.1:{free_port()}", Path("router.log"))]
    for server, thread in started:
        server.shutdown()
        server.server_close()
        thread.join()


def test_all_pages_are_one(servers: list[Process]) -> None:
    """Names as they were, in one family each, and of every sample whose it is; who does not answer is down."""
    port = free_port()
    metrics.publish(servers, "127.0.0.1", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        page = answer.read().decode()
    assert page.count("# TYPE tokens_total counter") == 1
    assert 'tokens_total{model_name="demo",role="prefill",server="prefill-1"} 10.0' in page
    assert 'tokens_total{model_name="demo",role="decode",server="decode-1"} 20.0' in page
    assert 'seconds_bucket{le="2.0",role="decode",server="decode-1"} 1.0' in page
    families = {family.name: family for family in text_string_to_metric_families(page)}
    up = {sample.labels["server"]: sample.value for sample in families["mixquant_server_up"].samples}
    assert up == {"prefill-1": 1, "decode-1": 1, "router": 0}
    assert families["tokens"].type == "counter"
    assert families["seconds"].type == "histogram"


def test_restarts_are_counted(tmp_path: Path) -> None:
    process = Process("router", ["true"], "http://127.0.0.1:1", tmp_path / "router.log")
    for _ in range(3):
        process.start()
        process.stop(0)
    (restarts,) = (f for f in metrics.Gathered([process]).collect() if f.name == "mixquant_server_restarts")
    assert [sample.value for sample in restarts.samples] == [2]
