"""vLLM on a CPU: how much memory its KV cache gets, and in which order a compiled step runs.

By itself vLLM takes 92 % of a machine's memory for it, and refuses to start where less is free.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from mixquant.devices import available_bytes

if TYPE_CHECKING:
    from vllm.config import CompilationConfig

LARGEST = 4 << 30
"""Bytes of the cache, or a quarter of the free memory where that is less."""


def cache_bytes() -> int | None:
    """How large a KV cache to ask for; None where the user's environment says it, or nobody can tell what is free."""
    free = available_bytes(torch.device("cpu"))
    return None if free is None or "VLLM_CPU_KVCACHE_SPACE" in os.environ else min(LARGEST, free // 4)


def keep_order(config: CompilationConfig) -> None:
    """Let torch not move a compiled step's operations to save memory: it forgets (2.13) that vLLM's BF16 product writes
    into a tensor made before, and a router of DeepSeek V3 then chose experts by logits that were not there yet."""
    config.inductor_compile_config.setdefault("reorder_for_peak_memory", False)
