"""Prefill weights from a quantized folder: which one, and how its layers become vLLM's.

A folder comes in by one of two ways, and the BF16 weights always are what vLLM's own loader loads:

    vllm serve DIR --quantization mixquant       DIR/mixquant.json names the BF16 model, and vLLM's loader is sent there
    vllm serve MODEL --hf-overrides ...          with "prefill_weights": "DIR" among the fields of the policy

vLLM fuses layers (q, k and v into one) and shards them over tensor-parallel ranks. A folder's tensors go through the
very loader of the layer they belong to, so they are fused and sharded as its BF16 weight was, whatever the layer's
class: codes and block scales like a weight, scales of rows like a column of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.parameter import ChannelQuantScaleParameter, ModelWeightParameter

from mixquant.checkpoint.locate import Found, fetch
from mixquant.checkpoint.prefill import check_twin, missing_layer, settle
from mixquant.checkpoint.quantized import QuantizedFolder, StoredLayer
from mixquant.checkpoint.sidecar import find_sidecar
from mixquant.errors import InputError
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.kernels.base import Quantized
from mixquant.policy import Policy

Packed = Mapping[str, Sequence[str]]
"""vLLM's packed_modules_mapping: last name of a fused layer -> last names of the checkpoint's layers."""


@dataclass(frozen=True)
class Sources:
    """What an engine runs: a policy with its format named where a folder decides it; the folder; and the BF16 model,
    where it is another one than vLLM was given."""

    policy: Policy
    folder: QuantizedFolder | None = None
    decode_model: str | None = None

    def send_loader(self, config: VllmConfig) -> None:
        """Point vLLM's loader to the BF16 model. Called in each worker, before its weights are loaded."""
        if self.decode_model is None:
            return
        model, draft = config.model_config, getattr(config.speculative_config, "draft_model_config", None)
        if draft is not None and draft is not model and draft.model == model.model:  # n-grams' is the model's own
            raise InputError(
                f"The draft would read its weights from the quantized folder {draft.model}: serve "
                f'{self.decode_model} with "prefill_weights" naming the folder.'
            )
        model.model, model.revision = self.decode_model, None


def resolve(found: Found, policy: Policy | None, prefill_weights: str | None) -> Sources:
    """The sources of an engine that vLLM was told to start on a model; `policy` is what the user said, if anything."""
    if prefill_weights is not None:
        if found.quantized is not None:
            raise InputError(f"{found.name} is itself quantized: leave out prefill_weights, or serve its BF16 model.")
        return _folder_beside(found, policy, fetch(prefill_weights))
    made_for = policy or (found.sidecar.policy if found.sidecar else Policy())
    if found.quantized is None:
        return Sources(made_for)
    found.check()
    return with_folder(found.quantized, made_for, found.decode)


def _folder_beside(found: Found, policy: Policy | None, path: Path) -> Sources:
    sidecar = find_sidecar(path)
    if sidecar is not None and sidecar.decode_model is not None:
        sidecar.decode_model.located(path).check(found.download())
    return with_folder(QuantizedFolder(path), policy or (sidecar.policy if sidecar else Policy()))


def with_folder(folder: QuantizedFolder, policy: Policy, decode_model: str | None = None) -> Sources:
    """Sources with quantized weights, which also name the format of a policy that says auto."""
    return Sources(settle(policy, folder), folder, decode_model)


class PrefillWeights:
    """A folder's layers under vLLM's names."""

    def __init__(self, folder: QuantizedFolder) -> None:
        self.folder = folder
        self._names = {name: name for name in folder.layers()}  # vLLM's name -> the folder's

    def rename(self, mapper: Any) -> None:
        """Follow a WeightsMapper, by which vLLM's model renames the checkpoint's layers."""
        self._names = {new: old for name, old in self._names.items() for new in mapper.apply_list([name])}

    def spares(self, name: str, packed: Packed) -> bool:
        """Whether the folder left a layer in BF16."""
        formats = {self.folder.format(part) for part in self._parts(name, packed)}
        if len(formats) > 1:
            raise InputError(
                f"{name} is fused of layers that {self.folder.path} holds in {' and '.join(sorted(formats))}: add "
                "them to `ignore`, or use a folder that quantizes them alike."
            )
        return formats == {"bf16"}

    def read(self, name: str, layer: nn.Module, packed: Packed) -> StoredLayer:
        """The quantized twin of a layer's loaded weight: its parts, fused, and this rank's shard of them."""
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        parts = [self.folder.read(part) for part in self._parts(name, packed)]
        scales = {part.activation_global_scale for part in parts}
        if len(scales) > 1:
            raise InputError(f"its fused parts have different activation scales in {self.folder.path}: {_ALIKE}")
        stored = StoredLayer(self._fuse([part.weight for part in parts], layer, weight), scales.pop())
        check_twin(stored.weight, weight, self.folder.path)
        return stored

    def _parts(self, name: str, packed: Packed) -> list[str]:
        names = fused_parts(name, packed)
        if absent := [part for part in names if part not in self._names]:
            raise missing_layer(absent[0], self.folder.path)
        return [self._names[part] for part in names]

    def _fuse(self, parts: list[Quantized], layer: nn.Module, like: Tensor) -> Quantized:
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
    loader: Any = getattr(layer, "weight_loader_v2", None) or layer.weight_loader
    if columns == 1:
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    else:
        parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
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
