"""Quantized folders as compressed-tensors and ModelOpt write them, made from a small Transformers model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixquant.checkpoint.sidecar import DecodeModel, Sidecar, fingerprint, write_sidecar
from mixquant.formats import nvfp4, quantizer
from mixquant.policy import Policy

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
"""Layers that engines fuse: their NVFP4 global scale is one."""

ACTIVATION_GLOBAL_SCALE = nvfp4.ACTIVATION_GLOBAL_SCALE


def compressed_nvfp4(name: str, q: nvfp4.NVFP4Tensor, activation: float | None) -> dict[str, Tensor]:
    tensors = {
        f"{name}.weight_packed": q.packed,
        f"{name}.weight_scale": q.scales,
        f"{name}.weight_global_scale": q.global_scale.reshape(1),
    }
    if activation is not None:
        tensors[f"{name}.input_global_scale"] = torch.tensor([activation])
    return tensors


def modelopt_nvfp4(name: str, q: nvfp4.NVFP4Tensor, activation: float | None) -> dict[str, Tensor]:
    tensors = {
        f"{name}.weight": q.packed,
        f"{name}.weight_scale": q.scales,
        f"{name}.weight_scale_2": 1.0 / q.global_scale,
    }
    if activation is not None:
        tensors[f"{name}.input_scale"] = torch.tensor(1.0 / activation)
    return tensors


def one_scale_a_row(name: str, q: Any, activation: float | None) -> dict[str, Tensor]:
    return {f"{name}.weight": q.codes, f"{name}.weight_scale": q.scales}


LAYOUTS = {
    ("compressed-tensors", "nvfp4"): compressed_nvfp4,
    ("modelopt", "nvfp4"): modelopt_nvfp4,
    ("compressed-tensors", "fp8"): one_scale_a_row,
    ("compressed-tensors", "int8"): one_scale_a_row,
}


def write_quantized(
    source: Path,
    target: Path,
    format: str = "nvfp4",
    tool: str = "compressed-tensors",
    scales: str = "search",
    activation: float | None = ACTIVATION_GLOBAL_SCALE,
    global_scale: Callable[[str, Tensor], Tensor] | None = None,
    ignore: tuple[str, ...] = (),
) -> Path:
    """Quantize the linear layers of the model in `source` into `target`.

    global_scale: from a layer's name and its group's amax to a global scale that is no power of two.
    """
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    names = [name.removesuffix(".weight") for name in weights if name.endswith("_proj.weight")]
    layers = [name for name in names if not name.endswith(ignore)]
    amax = group_amax(weights, layers)
    tensors: dict[str, Tensor] = {}
    for name in layers:
        weight = weights.pop(f"{name}.weight")
        q = quantizer(format, scales, amax[name])(weight)
        if global_scale is not None:
            q = nvfp4.quantize(weight, global_scale(name, amax[name]))
        tensors |= LAYOUTS[tool, format](name, q, activation)
    save_file(tensors | weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = quantization_config(format, tool, activation)
    (target / "config.json").write_text(json.dumps(config))
    return target


def name_decode_model(folder: Path, decode: Path, policy: Mapping[str, Any]) -> None:
    """Write `mixquant.json`, as our quantizer does."""
    model = DecodeModel(str(decode), hash=fingerprint(decode))
    write_sidecar(folder, Sidecar(Policy.parse(policy), model))


def write_folded(source: Path, target: Path, **arguments: Any) -> Path:
    """A quantized folder whose scales were folded: each channel of the values in the KV cache times a power of two.

    The folded BF16 model stands in `target`/decode, as our quantizer leaves it.
    """
    folded = shutil.copytree(source, target.with_name(f"{target.name}-folded"))
    weights = load_file(folded / "model.safetensors")
    config = json.loads((folded / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name in [name for name in weights if name.endswith("v_proj.weight")]:
        o_proj = name.replace("v_proj", "o_proj")
        factors = 2.0 ** (torch.arange(len(weights[name])) % 4)
        weights[name] *= factors.unsqueeze(1)
        weights[o_proj] /= factors.view(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()
    save_file(weights, folded / "model.safetensors", metadata={"format": "pt"})
    write_quantized(folded, target, **arguments)
    shutil.move(folded, target / "decode")
    decode = DecodeModel("decode", hash=fingerprint(target / "decode"))
    write_sidecar(target, Sidecar(Policy(prefill=arguments.get("format", "nvfp4"), tail=1), decode))
    return target


def group_amax(weights: Mapping[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """The largest magnitude of all layers that are fused with a layer."""

    def group(name: str) -> str:
        parent, _, own = name.rpartition(".")
        return f"{parent}.{FUSED.get(own, own)}"

    largest: dict[str, Tensor] = {}
    for name in layers:
        own = nvfp4.largest_magnitude(weights[f"{name}.weight"])
        largest[group(name)] = torch.maximum(largest.get(group(name), own), own)
    return {name: largest[group(name)] for name in layers}


def quantization_config(format: str, tool: str, activation: float | None) -> dict[str, Any]:
    """What the tool writes into config.json."""
    if tool == "modelopt":
        scheme = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        return {
            "quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.47.0"},
            "ignore": ["lm_head"], "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": scheme}},
        }  # fmt: skip
    nvfp4_scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    rows = {"num_bits": 8, "type": "int" if format == "int8" else "float", "symmetric": True}
    weights, inputs = {
        "nvfp4": (nvfp4_scheme | {"dynamic": False}, nvfp4_scheme | {"dynamic": "local"}),
        "fp8": (rows | {"strategy": "channel", "dynamic": False}, rows | {"strategy": "token", "dynamic": True}),
        "int8": (rows | {"strategy": "channel", "dynamic": False}, rows | {"strategy": "token", "dynamic": True}),
    }[format]
    name = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized", "int8": "int-quantized"}[format]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None if activation is None else inputs}
    return {
        "quant_method": "compressed-tensors", "format": name, "quantization_status": "compressed",
        "ignore": ["lm_head"], "kv_cache_scheme": None,
        "config_groups": {"group_0": group | {"format": name, "output_activations": None}},
    }  # fmt: skip
