"""What a quantized folder consists of: tensors under compressed-tensors' names, its config.json, safetensors shards.

A shard is written like every other file of a folder (`mixquant.files`): whole or not there. `mixquant.offline.partial`
says in which order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mixquant.checkpoint.shards import file_headers
from mixquant.files import publish
from mixquant.formats import Quantized

_BLOCKS = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip


def _one_scale_a_row(format: str, type: str) -> dict[str, Any]:
    codes = {"num_bits": 8, "type": type, "symmetric": True}
    return {
        "format": format,
        "weights": codes | {"strategy": "channel", "dynamic": False, "observer": "memoryless_minmax"},
        "input_activations": codes | {"strategy": "token", "dynamic": True, "observer": None},
    }


SCHEMES = {
    "nvfp4": {
        "format": "nvfp4-pack-quantized",
        "weights": _BLOCKS | {"dynamic": False, "observer": "memoryless_minmax"},
        "input_activations": _BLOCKS | {"dynamic": "local", "observer": "static_minmax"},
    },
    "fp8": _one_scale_a_row("float-quantized", "float"),
    "int8": _one_scale_a_row("int-quantized", "int"),
}
"""What compressed-tensors calls our formats; a test holds them to its own presets."""


def compressed(layer: str, quantized: Quantized, activation_scale: float | None) -> dict[str, Tensor]:
    """A quantized layer's tensors under compressed-tensors' names."""
    tensors = quantized.tensors()
    if activation_scale is not None:
        tensors["input_global_scale"] = torch.tensor([activation_scale])
    return {f"{layer}.{name}": tensor for name, tensor in tensors.items()}


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


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole or not there."""
    half = path.with_name(f"{path.name}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, half, metadata={"format": "pt"})
    half.chmod(0o644)  # safetensors makes files that only their owner can read
    publish(half, path)


def shard_index(shards: Sequence[Path]) -> dict[str, Any]:
    """Which shard has which tensor, and how many bytes they all are: from headers."""
    places: dict[str, str] = {}
    size = 0
    for file in shards:
        headers = file_headers(file)
        places |= dict.fromkeys(headers, file.name)
        size += sum(header.bytes for header in headers.values())
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
