"""Tensor parallelism: what the shards of one weight must agree on."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from mixquant.formats.nvfp4 import largest_magnitude


def weight_amax(layer: nn.Module, weight: Tensor) -> Tensor | None:
    """Largest magnitude over all shards of a layer's weight, float32 []; None where the layer is whole.

    Without it every rank would choose its own NVFP4 global scale, and the result would depend on their number.
    """
    if get_tensor_model_parallel_world_size() == 1 or getattr(layer, "tp_size", 1) == 1:
        return None
    return _over_ranks(largest_magnitude(weight))


def expert_amax(weight: Tensor) -> Tensor | None:
    """The same for each matrix of a sharded set of experts [experts, N, K]: float32 [experts]."""
    if get_tensor_model_parallel_world_size() == 1:
        return None
    return _over_ranks(torch.stack([largest_magnitude(expert) for expert in weight]))


def _over_ranks(amax: Tensor) -> Tensor:
    torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=get_tp_group().device_group)
    return amax
