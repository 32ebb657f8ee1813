"""What a policy costs and what runs: the memory bill, before or after conversion, and the kernel of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixquant import kernels
from mixquant.convert import target_linears
from mixquant.errors import InputError
from mixquant.formats.nvfp4 import ActivationRange, activation_range
from mixquant.kernels.base import LinearKernel
from mixquant.linear import PhaseLinear
from mixquant.policy import Policy


@dataclass(frozen=True)
class Memory:
    """Bytes of a model's tensors, each storage counted once.

    decode_bytes: what decoding reads, embeddings and norms included. prefill_bytes: what quantized prefill adds
    (emulation copies too). original_bytes: the checkpoint's own model.
    """

    decode_bytes: int
    prefill_bytes: int
    original_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.decode_bytes + self.prefill_bytes

    @property
    def overhead_ratio(self) -> float:
        """Total over the original model's bytes."""
        return self.total_bytes / self.original_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total_bytes": self.total_bytes, "overhead_ratio": round(self.overhead_ratio, 4)}


def memory(
    model: nn.Module, policy: Policy | str | Mapping[str, Any] | None = None, device: torch.device | str | None = None
) -> Memory:
    """The bill of a converted model; with a policy, the bill that converting `model` on `device` would give.

    The model may live on the meta device: only shapes and dtypes are read.
    """
    if policy is None:
        return _converted_bill(model)
    return _planned_bill(model, Policy.parse(policy), torch.device(device) if device else None)


def _converted_bill(model: nn.Module) -> Memory:
    rest = _unique_storages([*model.parameters(), *model.buffers()])
    decode, original = dict(rest), dict(rest)
    prefill: dict[int, int] = {}
    for layer in _phase_linears(model):
        held = _unique_storages(layer.decode.tensors())
        decode |= held
        prefill |= _unique_storages(layer.prefill.tensors())
        # The original weight takes the place of the decode kernel's first tensor: tied layers count once.
        original[next(iter(held))] = layer.in_features * layer.out_features * layer.dtype.itemsize
    only_prefill = sum(size for key, size in prefill.items() if key not in decode)
    return Memory(sum(decode.values()), only_prefill, sum(original.values()))


def _planned_bill(model: nn.Module, policy: Policy, device: torch.device | None) -> Memory:
    everything = _unique_storages([*model.parameters(), *model.buffers()])
    decode = original = sum(everything.values())
    prefill = 0
    counted: set[int] = set()
    for _, linear in target_linears(model, policy):
        weight = linear.weight
        if id(weight) in counted:
            continue
        counted.add(id(weight))
        (n, k), on = weight.shape, device or weight.device
        decoder = kernels.choose(policy.decode, (n, k), on, weight.dtype, policy)
        prefiller = kernels.choose(policy.prefill, (n, k), on, weight.dtype, policy)
        decode += decoder.nbytes(n, k, weight.dtype) - weight.nbytes
        prefill += 0 if prefiller is decoder else prefiller.nbytes(n, k, weight.dtype)
    return Memory(decode, prefill, original)


def explain(model: nn.Module) -> list[dict[str, Any]]:
    """One row per converted layer: name, shape [N, K], kernel and format in each phase, and whether it is emulated."""
    rows = []
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, PhaseLinear):
            row = {"name": name, "shape": [layer.out_features, layer.in_features]}
            rows.append(row | {phase: _describe(getattr(layer, phase)) for phase in ("prefill", "decode")})
    if not rows:
        raise InputError("The model has no phase-aware layer: call mixquant.convert_(model, policy) first.")
    return rows


@torch.no_grad()
def activation_ranges(model: nn.Module, input_ids: Tensor) -> dict[str, ActivationRange]:
    """How many blocks of each NVFP4 layer's input the static global scale misses, over one forward of `input_ids`."""
    counts: dict[str, ActivationRange] = {}

    def watch(name: str, layer: PhaseLinear) -> RemovableHandle:
        scale = getattr(layer.prefill, "activation_global_scale", None)

        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if scale is not None:
                counts[name] = activation_range(args[0].flatten(0, -2), scale)

        return layer.register_forward_pre_hook(count)

    handles = [watch(name, layer) for name, layer in model.named_modules() if isinstance(layer, PhaseLinear)]
    try:
        model(input_ids=input_ids)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def kernels_used(model: nn.Module) -> dict[str, list[str]]:
    """Names of the kernels that run in each phase."""
    layers = list(_phase_linears(model))
    return {phase: sorted({getattr(layer, phase).name for layer in layers}) for phase in ("prefill", "decode")}


def is_emulated(model: nn.Module) -> bool:
    """Whether any layer runs an emulated kernel in any phase: then no time of this model may be shown."""
    return any(layer.prefill.emulated or layer.decode.emulated for layer in _phase_linears(model))


def available_bytes(device: torch.device) -> int | None:
    """Free memory on the device, within the container's limit, or None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    except OSError:
        return None
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _describe(kernel: LinearKernel) -> dict[str, Any]:
    return {"kernel": kernel.name, "format": kernel.format, "emulated": kernel.emulated}


def _phase_linears(model: nn.Module) -> Iterator[PhaseLinear]:
    return (module for module in model.modules() if isinstance(module, PhaseLinear))


def _unique_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address; tensors without one (packed by oneDNN, or on the meta device) each count as their own."""
    return {id(t) if t.is_mkldnn or t.is_meta else t.data_ptr(): t.nbytes for t in tensors if t.numel()}
