"""A KV store outside the engines: vLLM's OffloadingConnector over a dictionary that all engines of this process share.

    kv_transfer_config=store.CONFIG

`BLOCKS` holds a KV block of every layer under vLLM's own key, its block hash.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    LookupResult,
    OffloadingManager,
    OffloadingSpec,
    OffloadingWorker,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    TransferResult,
)

CONFIG = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"spec_name": "SharedStore", "spec_module_path": __name__},
}

BLOCKS: dict[OffloadKey, list[torch.Tensor]] = {}


@dataclass
class Keys(LoadStoreSpec):
    keys: list[OffloadKey]


class SharedStore(OffloadingSpec):
    def get_manager(self) -> OffloadingManager:
        return Manager()

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return Worker(kv_caches)


class Manager(OffloadingManager):
    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        return LookupResult.HIT if key in BLOCKS else LookupResult.MISS

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> Keys:
        return Keys(list(keys))

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        new = [key for key in keys if key not in BLOCKS]
        return PrepareStoreOutput(new, Keys(new), [])

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()


class Worker(OffloadingWorker):
    def __init__(self, kv_caches: CanonicalKVCaches) -> None:
        self.tensors = [cache.tensor for cache in kv_caches.tensors]
        self.done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: Any) -> bool:
        for key, block in zip(dst_spec.keys, src_spec.block_ids, strict=True):
            BLOCKS[key] = [tensor[block].clone() for tensor in self.tensors]
        return self._finish(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: GPULoadStoreSpec) -> bool:
        for key, block in zip(src_spec.keys, dst_spec.block_ids, strict=True):
            for tensor, data in zip(self.tensors, BLOCKS[key], strict=True):
                tensor[block].copy_(data)
        return self._finish(job_id)

    def _finish(self, job_id: int) -> bool:
        self.done.append(TransferResult(job_id, True))
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        return
