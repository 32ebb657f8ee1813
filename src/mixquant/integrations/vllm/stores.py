"""External KV stores: what was written under one policy, an engine of another must not read.

Stores keep KV blocks under hashes of the tokens in them; whether a prompt was read in four bits or in sixteen stands in
no hash. Where the key comes from vLLM's own block hashes, the policy goes into them as vLLM's `cache_salt`, which
starts the chain of each request: engines of one policy share, engines of different ones (and stock ones) never meet.
Connectors that hand a request's blocks from one engine to another keep nothing: a prefill and a decode server run one
policy by design. All others are refused, since nothing is known of their keys.

vLLM's engine core sets the salt on each request, for mixquant engines with an external store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import mixquant
from mixquant.checkpoint.sidecar import fingerprint
from mixquant.integrations.vllm.checkpoint import Sources
from mixquant.integrations.vllm.hooks import wrap
from mixquant.integrations.vllm.short_prompts import min_prompt

BY_BLOCK_HASH = ("OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector", "LMCacheMPConnector")
"""Connectors whose keys contain vLLM's block hashes, or its cache salt."""

POINT_TO_POINT = ("NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector")
"""Connectors that hand blocks over by request, and keep none."""


def connectors(transfer: Any) -> Iterator[str]:
    """Names of the connectors in a KVTransferConfig, those inside a MultiConnector too."""
    if transfer is None or transfer.kv_connector is None:
        return
    if transfer.kv_connector == "MultiConnector":
        yield from (child["kv_connector"] for child in transfer.kv_connector_extra_config.get("connectors", ()))
    else:
        yield transfer.kv_connector


def salt(sources: Sources, device: str) -> str:
    """What all KV that these sources make on `device` has in common. `auto` means other formats on other devices,
    and other FP8 codes where their weights nest. Of `min_prompt` the number counts that is in force.

    25 characters that LMCache, too, allows in a salt (no @ or slashes, at most 128 with the user's own).
    """
    policy = sources.policy
    formats = {policy.prefill, policy.decode}
    by_device = "auto" in formats or (policy.storage == "auto" and "fp8" in formats)
    facts = {
        "version": mixquant.__version__,
        "policy": policy.to_dict() | {"min_prompt": min_prompt(policy.held)},
        "device": device if by_device else None,
        "folder": sources.folder and fingerprint(sources.folder.path),
    }
    return "mixquant-" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def install() -> None:
    """Wrap this process's engine core; calling it again changes nothing."""
    from vllm.v1.engine.core import EngineCore

    wrap(EngineCore, "preprocess_add_request", _salted)


def _salted(method: Any, core: Any, original: Any, request: Any) -> Any:
    if any(name in BY_BLOCK_HASH for name in connectors(core.vllm_config.kv_transfer_config)):
        own = method.store_salt
        if not (request.cache_salt or "").startswith(own):
            request.cache_salt = own + (request.cache_salt or "")
    return original(request)
