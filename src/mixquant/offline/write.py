"""What a quantized checkpoint consists of: tensors under compressed-tensors' names, files that are whole or not there.

Every file is written beside its name, flushed to the disk, and renamed; `mixquant.offline.partial` says in which order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixquant.checkpoint.sidecar import SIDECAR
from mixquant.errors import InputError
from mixquant.formats.nvfp4 import NVFP4Tensor
from mixquant.kernels.base import Quantized


def compressed(layer: str, quantized: Quantized, activation_scale: float | None) -> dict[str, Tensor]:
    """A quantized layer's tensors under compressed-tensors' names."""
    if isinstance(quantized, NVFP4Tensor):
        assert activation_scale is not None
        return {
            f"{layer}.weight_packed": quantized.packed,
            f"{layer}.weight_scale": quantized.scales,
            f"{layer}.weight_global_scale": quantized.global_scale.reshape(1).clone(),  # a fused group shares it
            f"{layer}.input_global_scale": torch.tensor([activation_scale]),
        }
    return {f"{layer}.weight": quantized.codes, f"{layer}.weight_scale": quantized.scales}


def quantization_config(format: str, ignore: list[str]) -> dict[str, Any]:
    """What compressed-tensors wants in config.json, as its own tools write it."""
    layout = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized", "int8": "int-quantized"}[format]
    if format == "nvfp4":
        common = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
        common |= {"scale_dtype": "torch.float8_e4m3fn"}
        weights = common | {"dynamic": False, "observer": "memoryless_minmax"}
        inputs = common | {"dynamic": "local", "observer": "static_minmax"}
    else:
        common = {"num_bits": 8, "type": "int" if format == "int8" else "float", "symmetric": True}
        weights = common | {"strategy": "channel", "dynamic": False, "observer": "minmax"}
        inputs = common | {"strategy": "token", "dynamic": True, "observer": None}
    scheme = {"weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "format": layout} | scheme},
    }


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk, and everything else a file system answers, into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kept = "; finished layers are kept" if (path / SIDECAR).is_file() else ""
        raise InputError(
            f"{path} cannot be written ({reason}): make room or choose another place, and run the same command "
            f"again{kept}."
        ) from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or not there."""
    half = path.with_name(f"{path.name}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, half, metadata={"format": "pt"})
    half.chmod(0o644)  # safetensors makes files that only their owner can read
    flush(half)
    half.rename(path)
    flush(path.parent)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(document, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not there."""
    half = path.with_name(f"{path.name}.tmp")
    half.write_text(text, encoding="utf-8")
    flush(half)
    half.rename(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def shard_index(shards: Sequence[Path]) -> dict[str, Any]:
    """Which shard has which tensor."""
    places: dict[str, str] = {}
    size = 0
    for file in shards:
        with safe_open(file, framework="pt") as tensors:
            places |= dict.fromkeys(tensors.keys(), file.name)
            size += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
