"""What a policy costs: the memory bill of a model, before or after its conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixquant.checkpoint.mapped import mapped_bytes
from mixquant.kernels.base import LinearKernel
from mixquant.kernels.layer import choose_kernels
from mixquant.kernels.nested import NestedKernel
from mixquant.model.explain import phase_linears
from mixquant.model.targets import target_linears
from mixquant.policy import Policy


@dataclass(frozen=True)
class Memory:
    """Bytes of a model's tensors, each storage counted once.

    decode_bytes: what decoding reads, embeddings and norms included. prefill_bytes: what quantized prefill adds
    (emulation copies too). original_bytes: the checkpoint's own model. layers: how many weights are converted, and
    nested_layers: how many of them serve both phases. What the escapes of nested weights take is counted once the
    weights are there.
    mapped_bytes: of the total, what stays in the checkpoint's mapped files on a CPU (embeddings, norms): resident once
    it is read, and the system may drop it. The rest is the process's own memory.
    freed_bytes: of the original, weights that are given back once they are in the kernels' layouts.
    """

    decode_bytes: int
    prefill_bytes: int
    original_bytes: int
    layers: int
    nested_layers: int
    mapped_bytes: int = 0
    freed_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.decode_bytes + self.prefill_bytes

    @property
    def own_bytes(self) -> int:
        """Of the total, what is the process's own memory, or the device's."""
        return self.total_bytes - self.mapped_bytes

    @property
    def overhead_ratio(self) -> float:
        """Total over the original model's bytes."""
        return self.total_bytes / self.original_bytes

    def to_dict(self) -> dict[str, Any]:
        derived = {"total_bytes": self.total_bytes, "own_bytes": self.own_bytes}
        return asdict(self) | derived | {"overhead_ratio": round(self.overhead_ratio, 4)}


def memory(
    model: nn.Module,
    policy: Policy | str | Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    from_folder: bool = False,
    stored: torch.dtype | None = None,
) -> Memory:
    """The bill of a converted model; with a policy, the bill that converting `model` on `device` would give.

    The model may live on the meta device: only shapes and dtypes are read. from_folder: prefill weights are those of a
    quantized folder, which no nested weight contains. stored: the dtype in the checkpoint that such a model would come
    from; a CPU maps tensors of the model's own dtype, and copies others.

    >>> import mixquant, torch
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> with torch.device("meta"):
    ...     config = AutoConfig.from_pretrained(mixquant.DEMO)
    ...     model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    >>> bill = mixquant.memory(model, "fp8", device="cpu")  # emulated there: a second copy of the linear layers
    >>> round(bill.overhead_ratio, 2)
    1.98
    """
    if policy is None:
        return _converted_bill(model)
    return _planned_bill(model, Policy.parse(policy), torch.device(device) if device else None, from_folder, stored)


def _converted_bill(model: nn.Module) -> Memory:
    tensors = [*model.parameters(), *model.buffers()]
    decode, original = unique_storages(tensors), unique_storages(tensors)
    prefill: dict[int, int] = {}
    weights: dict[int, LinearKernel] = {}
    freed: dict[int, int] = {}
    for layer in phase_linears(model):
        weights[id(layer.decode)] = layer.decode
        held = unique_storages(layer.decode.tensors())
        decode |= held
        prefill |= unique_storages(layer.prefill.tensors())
        tensors += [*layer.decode.tensors(), *layer.prefill.tensors()]
        # The original weight takes the place of the decode kernel's first tensor: tied layers count once.
        weight = {next(iter(held)): layer.in_features * layer.out_features * layer.dtype.itemsize}
        original |= weight
        freed |= {} if _keeps_weight(layer.prefill, layer.decode) else weight
    only_prefill = sum(size for key, size in prefill.items() if key not in decode)
    nested = sum(isinstance(kernel, NestedKernel) for kernel in weights.values())
    totals = [sum(bill.values()) for bill in (decode, original, freed)]
    return Memory(totals[0], only_prefill, totals[1], len(weights), nested, mapped_bytes(tensors), totals[2])


def _planned_bill(
    model: nn.Module, policy: Policy, device: torch.device | None, from_folder: bool, stored: torch.dtype | None
) -> Memory:
    tensors = [*model.parameters(), *model.buffers()]
    decode = original = sum(unique_storages(tensors).values())
    mapped = _mapped(tensors, device, stored)
    prefill = nested = freed = 0
    counted: set[int] = set()
    for _, linear in target_linears(model, policy):
        weight = linear.weight
        if id(weight) in counted:
            continue
        counted.add(id(weight))
        chosen = choose_kernels(policy, weight.shape, device or weight.device, weight.dtype, from_folder=from_folder)
        n, k = weight.shape
        read, added = chosen.nbytes(n, k, weight.dtype)
        decode += read - weight.nbytes
        prefill += added
        nested += chosen.nested
        if not _keeps_weight(chosen.prefill, chosen.decode):
            freed += weight.nbytes
            mapped -= _mapped([weight], device, stored)
    return Memory(decode, prefill, original, len(counted), nested, mapped, freed)


def _keeps_weight(*kernels: LinearKernel | type[LinearKernel]) -> bool:
    return any(kernel.keeps_weight for kernel in kernels)


def _mapped(tensors: Iterable[Tensor], device: torch.device | None, stored: torch.dtype | None) -> int:
    """Bytes of tensors in mapped files, or for those of a model without weights, that would be in them."""
    if device is not None and device.type != "cpu":
        return 0
    tensors = list(tensors)
    planned = unique_storages(t for t in tensors if t.is_meta and t.dtype is stored)
    return mapped_bytes(t for t in tensors if not t.is_meta) + sum(planned.values())


def unique_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address; tensors without one (packed by oneDNN, or on the meta device) each count as their own."""
    return {id(t) if t.is_mkldnn or t.is_meta else t.data_ptr(): t.nbytes for t in tensors if t.numel()}
