"""The store of `store.py`, whose loads fail: what was asked for arrives as nonsense, and vLLM is told so.

kv_transfer_config=failing.CONFIG
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1 import offloading_connector
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec

from tests.integrations.vllm import store

CONFIG = {
    "kv_connector": "OffloadingConnector",
    "kv_connector_module_path": __name__,
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"spec_name": "FailingStore", "spec_module_path": __name__},
}

FAILED: set[int] = set()
"""Blocks of the KV cache whose load failed in this step."""

LOST: list[store.OffloadKey] = []
"""Keys of all blocks that failed to load."""


class OffloadingConnector(offloading_connector.OffloadingConnector):
    def get_block_ids_with_load_errors(self) -> set[int]:
        failed = set(FAILED)
        FAILED.clear()
        return failed


class FailingStore(store.SharedStore):
    def get_worker(self, kv_caches: CanonicalKVCaches) -> FailingWorker:
        return FailingWorker(kv_caches)


class FailingWorker(store.Worker):
    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        for key, block in zip(src_spec.keys, dst_spec.block_ids, strict=True):
            store.BLOCKS.pop(key, None)  # or it is asked for again, for ever
            LOST.append(key)
            FAILED.add(int(block))
            for tensor in self.tensors:
                tensor[block].fill_(1)
        return self._finish(job_id)
