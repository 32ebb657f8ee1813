"""vLLM's NIXL connector, which hands KV over only between servers of one pair.

vLLM names this module in `kv_connector_module_path` and takes the class of the stock connector's own name from it, so
that whatever it does for that name, it does for this one. What differs is the model's name in NIXL's compatibility
hash, which both sides compare at their first handshake. The stock one is the path that a server was started with: two
folders of one model do not match, and two models under one path do. Ours is what the servers are: model, tokenizer
and the policy of the prefill side (`pair.identity`).
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1 import nixl

from mixquant.errors import InputError
from mixquant.policy import METHOD


class NixlConnector(nixl.NixlConnector):  # type: ignore[misc]
    """The stock connector under the name of the pair."""

    def __init__(self, vllm_config: VllmConfig, role: Any, kv_cache_config: Any) -> None:
        super().__init__(renamed(vllm_config), role, kv_cache_config)


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
