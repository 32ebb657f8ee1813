"""Formats other than NVFP4 and an FP8 KV cache, in BF16.

In BF16 the largest logits lie 1/32 apart, so a log-probability can differ by that where two engines are right. What
these runs can show is that no row took the wrong product: the controls differ by several such steps.
"""

from __future__ import annotations

import pytest
import torch

from tests.integrations.vllm.scenarios import PHASE, Scenario

QUANTUM = 2.0**-5
"""Distance of neighbours among BF16 numbers from 4 to 8, where the largest logits lie."""

BF16 = {"dtype": "bfloat16"}


def test_int8(check_scenario):
    """INT8, native where the CPU has VNNI, in BF16"""
    check_scenario(Scenario(PHASE | {"prefill": "int8"}, precision=BF16), exact=QUANTUM)


def test_fp8(check_scenario):
    """FP8, emulated, in BF16"""
    check_scenario(Scenario(PHASE | {"prefill": "fp8"}, precision=BF16), exact=QUANTUM)


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM has an FP8 KV cache on CPUs with AVX-512 or AMX only",
)
def test_fp8_kv_cache(check_scenario):
    """NVFP4 with a KV cache in FP8, in BF16"""
    check_scenario(Scenario(precision=BF16 | {"kv_cache_dtype": "fp8"}), exact=QUANTUM)
