"""KV on its way to a decode server: what came too late is not used, and a connection that broke is made anew.

Between two machines a link can fail and come back, and vLLM has no answer to either half of that:

    too late      A fetch that hung is finished by TCP once the link is back. The prefill server has by then given the
                  blocks to another prompt, whose KV is what arrives; vLLM only logs this, on the prefill server. Here
                  a fetch that ends after its lease is an error of its request.
    never again   vLLM keeps what it knows of a prefill server, a broken connection too: every later fetch fails at
                  once, until one of the two servers is started again. Here a prefill server is forgotten after a fetch
                  of its KV has failed, so that the next request shakes hands with it.

That a fetch over a dead link ends at all is TCP's matter (`pair.UCX_TCP_USER_TIMEOUT`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """One request's KV. engine: the prefill server's, by NIXL's name for it. blocks: where the KV goes, by their
    numbers in this server's cache; none where a model has several groups of layers, each with numbers of its own.
    expires: the end of its lease, in seconds since the epoch."""

    engine: str
    blocks: frozenset[int]
    expires: float


class Fetches:
    """The fetches of one worker of a decode server, from its start to what the scheduler is told of its end."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._open: dict[str, Fetch] = {}
        self._ended: list[Fetch] = []
        self._late: set[int] = set()
        self._broken: set[str] = set()

    def start(self, received: Mapping[str, Any], expires: Mapping[str, float]) -> None:
        """vLLM has begun to fetch. received: its `ReqMeta` by request; expires: the ends of their leases."""
        for request, meta in received.items():
            if request in expires and meta.remote is not None:
                groups = meta.local_block_ids
                blocks = frozenset(groups[0]) if len(groups) == 1 else frozenset[int]()
                self._open[request] = Fetch(engine=meta.remote.engine_id, blocks=blocks, expires=expires[request])

    def end(self, requests: set[str], failed: set[str], now: float) -> set[str]:
        """vLLM says that these requests' fetches are over, and which of them failed; the ones that came too late."""
        over = {request: self._open.pop(request) for request in requests & self._open.keys()}
        self._open = {request: fetch for request, fetch in self._open.items() if self._is_open(request)}
        late = {request for request, fetch in over.items() if now > fetch.expires}
        for request in late:
            logger.warning("mixquant: KV of request %s came when its lease was over: it fails.", request)
            self._late |= over[request].blocks
        self._broken |= {fetch.engine for request, fetch in over.items() if request in failed}
        self._ended += over.values()
        return late

    def failed_blocks(self, failed: set[int]) -> set[int]:
        """Blocks that have no valid KV: those that vLLM names, and those of fetches that came too late. Whoever they
        were fetched from is forgotten."""
        self._broken |= {fetch.engine for fetch in self._ended if fetch.blocks & failed}
        self._ended = []
        late, self._late = self._late, set()
        self._forget()
        return failed | late

    def _is_open(self, request: str) -> bool:
        return request in self._worker._recving_metadata

    def _forget(self) -> None:
        """Drop what vLLM knows of broken prefill servers, once nothing is fetched from them any more."""
        for engine in self._broken - {fetch.engine for fetch in self._open.values()}:
            self._broken.remove(engine)
            if engine in self._worker._remote_agents:
                self._worker._cleanup_remote_engine(engine, log_eviction=False)
                logger.info("mixquant: a fetch from %s failed: the next one shakes hands again.", engine)
