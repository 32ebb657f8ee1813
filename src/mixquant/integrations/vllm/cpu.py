"""vLLM on a CPU: how much memory its KV cache gets.

By itself vLLM takes 92 % of a machine's memory for it, and refuses to start where less is free.
"""

from __future__ import annotations

import os

import torch

from mixquant.devices import available_bytes

LARGEST = 4 << 30
"""Bytes of the cache, or a quarter of the free memory where that is less."""


def cache_bytes() -> int | None:
    """How large a KV cache to ask for; None where the user's environment says it, or nobody can tell what is free."""
    free = available_bytes(torch.device("cpu"))
    return None if free is None or "VLLM_CPU_KVCACHE_SPACE" in os.environ else min(LARGEST, free // 4)
