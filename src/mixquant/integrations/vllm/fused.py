"""A quantized folder's layers as vLLM has them: renamed, fused, and sharded over tensor-parallel ranks.

vLLM fuses layers (q, k and v into one) and shards them. A folder's tensors go through the very loader of the layer they
belong to, so they are fused and sharded as its BF16 weight was, whatever the layer's class: codes and block scales like
a weight, scales of rows like a column of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from mixquant.checkpoint.prefill import check_copy, missing_layer
from mixquant.checkpoint.quantized import QuantizedFolder, StoredLayer
from mixquant.errors import InputError
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.kernels.base import Quantized

Packed = Mapping[str, Sequence[str]]
"""vLLM's packed_modules_mapping: last name of a fused layer -> last names of the checkpoint's layers."""


class FusedFolder:
    """A quantized folder under vLLM's names, with vLLM's fused layers."""

    def __init__(self, folder: QuantizedFolder) -> None:
        self.folder = folder
        self._names = {name: name for name in folder.layers()}  # vLLM's name -> the folder's

    def rename(self, mapper: Any) -> None:
        """Follow a WeightsMapper, by which vLLM's model renames the checkpoint's layers."""
        self._names = {new: old for name, old in self._names.items() for new in mapper.apply_list([name])}

    def ignores(self, name: str, parts: Sequence[str]) -> bool:
        """Whether the folder left a layer in BF16; InputError where it did so with some of the parts only."""
        formats = {self.folder.format(part) for part in self._stored(parts)}
        if len(formats) > 1:
            raise InputError(
                f"{name} is fused of layers that {self.folder.path} holds in {' and '.join(sorted(formats))}: add "
                "them to `ignore`, or use a folder that quantizes them alike."
            )
        return formats == {"bf16"}

    def read(self, parts: Sequence[str], layer: nn.Module) -> StoredLayer:
        """The quantized copy of a layer's loaded weight: its parts, fused, and this rank's shard of them."""
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        stored = [self.folder.read(part) for part in self._stored(parts)]
        scales = {part.activation_global_scale for part in stored}
        if len(scales) > 1:
            raise InputError(f"its fused parts have different activation scales in {self.folder.path}: {_ALIKE}")
        quantized = self._fuse([part.weight for part in stored], layer, weight)
        check_copy(quantized, weight, self.folder.path)
        return StoredLayer(quantized, scales.pop())

    def _stored(self, parts: Sequence[str]) -> list[str]:
        """The folder's own names of some layers."""
        if absent := [part for part in parts if part not in self._names]:
            raise missing_layer(absent[0], self.folder.path)
        return [self._names[part] for part in parts]

    def _fuse(self, parts: list[Quantized], layer: nn.Module, like: Tensor) -> Quantized:
        """Quantized weights of some layers as the weight of the one that vLLM fuses them into."""
        rows = [part for part in parts if isinstance(part, RowwiseTensor)]
        if rows:
            codes = fuse([part.codes for part in rows], layer, like)
            return RowwiseTensor(codes, fuse([part.scales for part in rows], layer, like))
        blocks = [part for part in parts if isinstance(part, NVFP4Tensor)]
        if len({float(part.global_scale) for part in blocks}) > 1:
            raise InputError(f"its fused parts have different global scales in {self.folder.path}: {_ALIKE}")
        packed, scales = (fuse([getattr(b, name) for b in blocks], layer, like) for name in ("packed", "scales"))
        return NVFP4Tensor(packed, scales, blocks[0].global_scale.to(like.device))


_ALIKE = "quantize q, k and v (gate and up) with one global scale, or add the layer to `ignore`."


def fused_parts(name: str, packed: Packed) -> list[str]:
    """Names of the checkpoint's layers that stand in one of vLLM's."""
    parent, dot, own = name.rpartition(".")
    return [f"{parent}{dot}{part}" for part in packed.get(own, [own])]


def fuse(parts: Sequence[Tensor], layer: nn.Module, like: Tensor) -> Tensor:
    """This rank's share of some parts' tensors [N, columns], as `layer` has loaded its weight `like` [n, k] from them.

    A single column holds one value a row, and is shared by the ranks that share the rows.
    """
    columns = parts[0].shape[1]
    whole_k: int = layer.input_size  # type: ignore[assignment]
    share = 1 if columns == 1 else columns * like.shape[1] // whole_k
    data = torch.empty(like.shape[0], share, dtype=parts[0].dtype, device=like.device)
    # vLLM's newer loaders read from a parameter's class how to shard it. Layers that are never sharded have none.
    loader: Any = getattr(layer, "weight_loader_v2", None) or layer.weight_loader
    if columns == 1:
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    else:
        parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    # A parameter asks the process group for these when it is made, but layers that vLLM keeps whole differ from it.
    parameter.tp_rank, parameter.tp_size = layer.tp_rank, layer.tp_size
    for part, shard in zip(parts, _shards(layer, len(parts)), strict=True):
        loader(parameter, part, *shard)
    return data


def _shards(layer: nn.Module, parts: int) -> list[tuple[Any, ...]]:
    """What vLLM calls the parts of a fused layer."""
    if parts == 1:
        return [()]
    names = ("q", "k", "v") if isinstance(layer, QKVParallelLinear) else range(len(getattr(layer, "output_sizes", ())))
    if len(names) != parts:
        raise InputError(f"vLLM fuses it in an unknown way ({type(layer).__name__}): add it to `ignore`.")
    return [(name,) for name in names]
