"""vLLM's NIXL connector, which hands KV over only between servers of one pair.

vLLM names this module in `kv_connector_module_path` and takes the class of the stock connector's own name from it, so
that whatever it does for that name, it does for this one. What differs is the model's name in NIXL's compatibility
hash, which both sides compare at their first handshake. The stock one is the path that a server was started with: two
folders of one model do not match, and two models under one path do. Ours is what the servers are: model, tokenizer
and the policy of the prefill side (`pair.identity`).

And a decode server that first hears of a prompt's KV when its lease is over does not fetch it, nor does it use what it
has fetched until then (`fetches`). The prefill server may have given the blocks to another prompt by then; vLLM would
read them all the same, and only log at the other end that they may be invalid. The time is the wall clock's, so the
machines of a pair need clocks that agree to a few seconds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import nixl
from vllm.logger import init_logger

from mixquant.errors import InputError
from mixquant.integrations.vllm.fetches import Fetches
from mixquant.policy import METHOD

logger = init_logger(f"vllm.{__name__}")

EXPIRES = "mixquant_expires"
"""Among the parameters of a hand-over: when its lease ends, unless the decode server has renewed it."""

LEASE_SECONDS = 30
MARGIN_SECONDS = 5
"""vLLM's lease of KV that nobody fetches (`kv_lease_duration`), and between a decode server's first renewals."""

NOBODY = {"remote_engine_id": "expired", "remote_port": 0}
"""Where no server is: asked for KV there, vLLM fails the request."""


POLL_MICROSECONDS = 100
"""How long NIXL's progress thread rests between two looks at the network, on CPUs."""


class NixlConnector(nixl.NixlConnector):  # type: ignore[misc]
    """The stock connector under the name of the pair."""

    def __init__(self, vllm_config: VllmConfig, role: Any, kv_cache_config: Any) -> None:
        if vllm_config.kv_transfer_config.kv_buffer_device == "cpu":
            rest_between_polls()
        super().__init__(renamed(vllm_config), role, kv_cache_config)
        self._expires: dict[str, float] = {}
        self._fetches = Fetches(self.connector_worker)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """A prompt has been read: its KV is kept, and where it is goes to the decode server by way of the router."""
        return _dated(super().request_finished(request, block_ids))

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return _dated(super().request_finished_all_groups(request, block_ids))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens are to be fetched; the scheduler asks before it fetches them."""
        send_nowhere_if_expired(request.kv_transfer_params, time.time())
        found: tuple[int | None, bool] = super().get_num_new_matched_tokens(request, num_computed_tokens)
        return found

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """The scheduler has found room for what is to be fetched."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if EXPIRES in (request.kv_transfer_params or {}):
            self._expires[request.request_id] = request.kv_transfer_params[EXPIRES]

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """What the scheduler tells the workers of a step."""
        told = super().build_connector_meta(scheduler_output)
        told.mixquant_expires, self._expires = self._expires, {}
        return told

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        told = self._connector_metadata
        self._fetches.start(told.reqs_to_recv, told.mixquant_expires)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """Requests whose KV has been sent, and received. vLLM 0.32 asks for `get_transfer_results` instead."""
        sent, received = super().get_finished(finished_req_ids)
        self._fetches.end(received, set(), time.time())
        return sent, received

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        results = super().get_transfer_results(finished_req_ids)
        late = self._fetches.end(results.finished_recving, results.failed_recving, time.time())
        results.failed_recving.update(late)
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The scheduler fails the requests that these belong to."""
        return self._fetches.failed_blocks(super().get_block_ids_with_load_errors())


def rest_between_polls() -> None:
    """Let NIXL's progress threads of this process rest; calling it again changes nothing.

    They poll without a pause, which takes a core from each engine, and where it computes on those cores, most of its
    speed. The agent has a setting for it that NIXL's Python sets to 0, whatever is asked for.
    """
    from nixl import _api

    plain = _api.nixlBind.nixlAgentConfig

    class Resting(plain):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, POLL_MICROSECONDS if name == "pthrDelay" else value)

    if plain.__name__ != Resting.__name__:
        _api.nixlBind.nixlAgentConfig = Resting


def _dated(finished: tuple[bool, dict[str, Any] | None]) -> tuple[bool, dict[str, Any] | None]:
    kept, parameters = finished
    if parameters is not None:
        parameters[EXPIRES] = time.time() + LEASE_SECONDS - MARGIN_SECONDS
    return kept, parameters


def send_nowhere_if_expired(parameters: dict[str, Any] | None, now: float) -> None:
    """Let a hand-over fail whose lease was over when it arrived."""
    if parameters is None or not parameters.get("do_remote_prefill") or now <= parameters.get(EXPIRES, now):
        return
    logger.warning(
        "mixquant: the lease of a prompt's KV ended %.0f s before its request arrived: it fails (or the clocks of the "
        "two servers differ).",
        now - parameters[EXPIRES],
    )
    parameters.update(NOBODY)


def renamed(config: VllmConfig) -> VllmConfig:
    """The same configuration for a connector, which calls the model by the pair's identity."""
    extra = config.kv_transfer_config.kv_connector_extra_config
    if METHOD not in extra:
        raise InputError(
            "This connector belongs to a pair: start both sides by `mixquant serve MODEL --role prefill` and `--role "
            "decode`, or take vLLM's own by leaving out kv_connector_module_path."
        )
    named = copy.copy(config)
    named.model_config = copy.copy(config.model_config)
    text = json.dumps(extra[METHOD], sort_keys=True)
    named.model_config.model = f"{METHOD}-" + hashlib.sha256(text.encode()).hexdigest()
    return named
