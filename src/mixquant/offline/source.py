"""The BF16 checkpoint that is read: its tensors one at a time, its decoder layers as units of work.

    source = Source.open(find("Qwen/Qwen3-8B"), Policy(prefill="nvfp4"))
    for unit in source.units:              # decoder layers in their order, then everything else
        for name in unit.tensors:
            source.tensor(name)

Tensors are views of memory-mapped files: they take no memory of the process's own until something is computed with
them, so what is only copied costs nothing, however large it is. The model itself stands on the meta device, and tells
which linear layers there are and how they are connected.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor, nn

from mixquant.checkpoint.locate import Found, already_quantized
from mixquant.checkpoint.quantized import PLAIN, quantized_by
from mixquant.checkpoint.shards import Headers, read_headers, undamaged
from mixquant.checkpoint.sidecar import DecodeModel, fingerprint
from mixquant.errors import InputError
from mixquant.formats import FORMATS
from mixquant.integrations.transformers.loading import meta_model
from mixquant.model.targets import experts_share, target_linears
from mixquant.offline.groups import Group, shared_groups
from mixquant.policy import Policy

_LAYER = re.compile(r"(.+?)\.(\d+)\.")  # the first number in a module's name is its decoder layer's


@dataclass(frozen=True)
class Unit:
    """A decoder layer, or with an empty name everything outside of them, which is copied as it is.

    tensors: names in the checkpoint. groups: of the linear layers to quantize.
    """

    name: str
    tensors: tuple[str, ...]
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True)
class Source:
    """A checkpoint and what is to be done with it.

    model: Transformers' own, on the meta device. kept: linear layers that stay BF16, and why. decode_model: how
    `mixquant.json` names it. headers: of all its tensors, by name.
    """

    folder: Path
    model: Any
    units: tuple[Unit, ...]
    kept: dict[str, str]
    decode_model: DecodeModel
    headers: Headers

    @classmethod
    def open(cls, found: Found, policy: Policy) -> Source:
        """Read headers only. Raises InputError where the model is quantized already or has nothing to quantize."""
        if found.quantized is not None:
            method = quantized_by(found.quantized.path) or "mixquant"
            raise already_quantized(found.name, method, f"quantize its BF16 model, {found.decode}")
        folder = found.download()
        model, headers = meta_model(found), read_headers(folder)
        linears = dict(target_linears(model, policy))
        layers = _decoder_layers(model, linears)
        kept = {linear: reason for linear in linears if (reason := _unsupported(model, linear, layers, policy))}
        targets = linears.keys() - kept.keys()
        if not targets:
            raise InputError(
                f"{found.name} has no linear layer to quantize: see `ignore`, or choose a causal language model."
            )
        _check_weights(model, targets, headers, folder)
        groups = [group for group in shared_groups(model) if _whole(group, targets)]
        units = tuple(_units(layers, headers, groups))
        return cls(folder, model, units, kept, _decode_model(found, folder), headers)

    def tensor(self, name: str) -> Tensor:
        """A view of the file's bytes."""
        file = self.headers[name].file
        with undamaged(file), safe_open(file, framework="pt") as tensors:
            found: Tensor = tensors.get_tensor(name)
        return found

    @property
    def targets(self) -> list[str]:
        """Names of all linear layers to quantize."""
        return [layer for unit in self.units for group in unit.groups for layer in group.layers]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(header.bytes for header in self.headers.values())

    @property
    def experts(self) -> float:
        """The share of the parameters that are fused experts, which stay as they are."""
        return experts_share(self.model)

    @property
    def widest(self) -> int:
        """The largest K of a layer to quantize."""
        return max(_linear(self.model, name).in_features for name in self.targets)

    @property
    def unquantized(self) -> list[str]:
        """Modules with a matrix that stays as it is: what compressed-tensors calls `ignore`."""
        targets = set(self.targets)
        linears = {name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)}
        stored = {name.removesuffix(".weight") for name in self.headers if name.endswith(".weight")}
        modules = {name for name, _ in self.model.named_modules()}
        return sorted((linears | (stored - modules)) - targets)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def _decoder_layers(model: nn.Module, linears: dict[str, nn.Linear]) -> list[str]:
    """Names of the decoder's layers: the siblings of the one that holds the first linear layer."""
    found = next((match for name in linears if (match := _LAYER.match(name))), None)
    if found is None:
        return []
    return [f"{found[1]}.{index}" for index, _ in model.get_submodule(found[1]).named_children()]


def _unsupported(model: nn.Module, name: str, layers: list[str], policy: Policy) -> str | None:
    """Why a linear layer stays BF16."""
    columns = _linear(model, name).in_features
    if not any(name.startswith(f"{layer}.") for layer in layers):
        return "it is outside of the decoder's layers"
    multiple = FORMATS[policy.prefill].multiple
    if columns % multiple:
        return f"its K of {columns} is no multiple of {multiple}"
    return None


def _whole(group: Group, targets: set[str]) -> bool:
    """Whether a group is to be quantized; InputError where only a part of it is."""
    chosen = [layer for layer in group.layers if layer in targets]
    if chosen and len(chosen) < len(group.layers):
        left = next(layer for layer in group.layers if layer not in targets)
        raise InputError(
            f"{left} would stay BF16 and {chosen[0]} would not, but engines fuse them: ignore both or none of them."
        )
    return bool(chosen)


def _units(layers: list[str], names: Iterable[str], groups: list[Group]) -> list[Unit]:
    """The decoder's layers in order, then the rest."""
    tensors: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        tensors[_owner(name, layers)].append(name)
    return [
        Unit(layer, tuple(tensors[layer]), tuple(group for group in groups if group.layers[0].startswith(f"{layer}.")))
        for layer in layers
    ] + [Unit("", tuple(tensors[""]))]


def _owner(name: str, layers: list[str]) -> str:
    match = _LAYER.match(name)
    layer = f"{match[1]}.{match[2]}" if match else ""
    return layer if layer in layers else ""


def _check_weights(model: nn.Module, targets: set[str], headers: Headers, folder: Path) -> None:
    """Raise InputError for a weight to quantize that is missing, of another shape, or quantized already."""
    for name in sorted(targets):
        tensor = f"{name}.weight"
        if tensor not in headers:
            raise InputError(f"{folder} has no {tensor}: use a complete checkpoint with the names of Transformers.")
        found, expected = headers[tensor], list(_linear(model, name).weight.shape)
        if found.dtype not in PLAIN:  # config.json of some FP8 checkpoints does not say that they are quantized
            raise InputError(
                f"{tensor} in {folder} holds {found.dtype} codes: it is quantized already, use the original BF16 "
                "checkpoint."
            )
        if found.shape != expected:
            raise InputError(
                f"{tensor} has shape {found.shape} and config.json says {expected}: use files of one model."
            )


def _decode_model(found: Found, folder: Path) -> DecodeModel:
    """Folders by their full path; hub ids by the revision whose snapshot `folder` is."""
    if found.name == "demo":
        return DecodeModel("demo", hash=fingerprint(folder))
    if found.folder:
        return DecodeModel(str(folder.resolve()), hash=fingerprint(folder))
    return DecodeModel(found.decode, folder.name, fingerprint(folder))
