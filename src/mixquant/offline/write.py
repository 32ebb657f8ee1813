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
from mixquant.formats import Quantized
from mixquant.formats.nvfp4 import BLOCK


def compressed(layer: str, quantized: Quantized, activation_scale: float | None) -> dict[str, Tensor]:
    """A quantized layer's tensors under compressed-tensors' names."""
    tensors = quantized.tensors()
    if activation_scale is not None:
        tensors["input_global_scale"] = torch.tensor([activation_scale])
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}


_BLOCKS = {
    "num_bits": 4, "type": "float", "symmetric": True,
    "strategy": "tensor_group", "group_size": BLOCK, "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_CHANNEL = {"strategy": "channel", "dynamic": False, "observer": "minmax"}
_TOKEN = {"strategy": "token", "dynamic": True, "observer": None}

SCHEMES = {
    "nvfp4": {
        "format": "nvfp4-pack-quantized",
        "weights": _BLOCKS | {"dynamic": False, "observer": "memoryless_minmax"},
        "input_activations": _BLOCKS | {"dynamic": "local", "observer": "static_minmax"},
    },
    "fp8": {"format": "float-quantized", "weights": _FLOAT8 | _CHANNEL, "input_activations": _FLOAT8 | _TOKEN},
    "int8": {"format": "int-quantized", "weights": _INT8 | _CHANNEL, "input_activations": _INT8 | _TOKEN},
}
"""What compressed-tensors calls each of our formats."""


def quantization_config(format: str, ignore: list[str]) -> dict[str, Any]:
    """What compressed-tensors wants in config.json, as its own tools write it."""
    scheme = SCHEMES[format]
    return {
        "quant_method": "compressed-tensors",
        "format": scheme["format"],
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {"group_0": {"targets": ["Linear"], "output_activations": None} | scheme},
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
