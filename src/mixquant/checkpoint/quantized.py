"""Quantized folders: the linear layers of a compressed-tensors or ModelOpt checkpoint, one at a time.

    QuantizedFolder("Qwen3-8B-NVFP4").read("model.layers.0.self_attn.q_proj")

A layer's format is told by its tensors, so that config.json need not be believed:

    format   written by           tensors of a layer [N, K]
    nvfp4    compressed-tensors   weight_packed U8 [N, K/2], weight_scale E4M3 [N, K/16], weight_global_scale,
                                  input_global_scale
    nvfp4    ModelOpt             weight U8 [N, K/2], weight_scale E4M3 [N, K/16], weight_scale_2, input_scale
    fp8      both                 weight E4M3 [N, K], weight_scale [N, 1] or one
    int8     compressed-tensors   weight I8 [N, K], weight_scale [N, 1] or one
    bf16     any                  weight

compressed-tensors' global scales are multipliers, like ours; ModelOpt's are their reciprocals. Activation scales of FP8
and INT8 layers are passed over: our kernels scale each token. Anything else in a layer (zero points, smoothing or
rotation of activations, blocks of another size) is refused, because leaving it out would change the model.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mixquant.checkpoint.shards import REMEDY, Headers, TensorHeader, read_headers, undamaged
from mixquant.errors import InputError
from mixquant.files import read_object
from mixquant.formats import Quantized
from mixquant.formats.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, NVFP4Tensor
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.policy import METHOD

_PASSED_OVER = frozenset(
    {"bias", "input_global_scale", "input_scale", "input_zero_point", "q_scale", "k_scale", "v_scale"}
)
"""Tensors of a layer that say nothing about its weight."""

PLAIN = ("BF16", "F16", "F32", "F64")
"""What safetensors calls numbers that are no codes."""

_CODES = {"U8": "nvfp4", "F8_E4M3": "fp8", "I8": "int8", **dict.fromkeys(PLAIN, "bf16")}
"""Format by the dtype that a safetensors file gives a layer's codes."""

_SCALES = {
    "weight_packed": {"nvfp4": {"weight_scale", "weight_global_scale"}},
    "weight": {"nvfp4": {"weight_scale", "weight_scale_2"}, "fp8": {"weight_scale"}, "int8": {"weight_scale"}},
}
"""The scales that must stand beside a layer's codes, by their name and format."""


_RANGE = E4M3_MAX * E2M1_MAX  # block maxima reach this over the global scale
SMALLEST_INPUT, LARGEST_INPUT = 2.0**-20, 2.0**32
"""Between these lie the largest inputs of linear layers, with any headroom that a quantizer leaves."""

LOWEST_MEDIAN = 2.0**-5
"""Of a folder's activation scales: inputs up to 86,000 in half of the layers, which only reciprocals say."""


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer's quantized weight as a folder has it.

    activation_global_scale: the static multiplier of NVFP4 activations; None where the folder names none.
    """

    weight: Quantized
    activation_global_scale: float | None = None


@dataclass(frozen=True)
class LayerHeader:
    """What a folder's headers say of a layer.

    shape: of its weight, [N, K] of a linear layer, unpacked. bytes: of all its tensors.
    """

    format: str
    shape: list[int]
    bytes: int


class QuantizedFolder:
    """The layers of a quantized checkpoint. Opening it reads headers only, whatever its size.

    Raises InputError where `path` holds no quantized layer.
    """

    def __init__(self, path: str | Path, headers: Headers | None = None) -> None:
        """headers: of all the folder's tensors, where they were read already."""
        self.path = Path(path)
        self._files: dict[Path, Any] = {}  # open for reading, each from its first tensor on
        self._layers: dict[str, dict[str, TensorHeader]] = defaultdict(dict)
        for name, header in (read_headers(self.path) if headers is None else headers).items():
            layer, _, tensor = name.rpartition(".")
            self._layers[layer][tensor] = header
        if quantization_config(self.path).get("transform_config"):
            raise InputError(f"{self.path} rotates activations: use a folder that was quantized without transforms.")
        if not any("weight_scale" in tensors for tensors in self._layers.values()):
            raise InputError(f"{self.path} holds no quantized layer: name a compressed-tensors or ModelOpt folder.")

    def __contains__(self, layer: str) -> bool:
        return self._codes(layer) is not None

    def layers(self) -> list[str]:
        """Names of all layers that have a weight."""
        return [layer for layer in self._layers if layer in self]

    @property
    def formats(self) -> set[str]:
        """The formats of the quantized layers."""
        return {self.format(layer) for layer, tensors in self._layers.items() if "weight_scale" in tensors}

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(header.bytes for tensors in self._layers.values() for header in tensors.values())

    def describe(self, layer: str) -> LayerHeader:
        """Format, shape and size of a layer."""
        (format, codes), tensors = self._format_and_codes(layer), self._layers[layer]
        shape = tensors[codes].shape
        if format == "nvfp4":
            shape = [*shape[:-1], shape[-1] * 2]
        return LayerHeader(format, shape, sum(header.bytes for header in tensors.values()))

    def format(self, layer: str) -> str:
        """nvfp4, fp8, int8, or bf16 where the folder left the layer as it was."""
        return self._format_and_codes(layer)[0]

    def read(self, layer: str, device: torch.device | str = "cpu") -> StoredLayer:
        """A quantized layer's tensors, unchanged, on `device`."""
        format, codes = self._format_and_codes(layer)
        weight, scales = (self._tensor(layer, name).to(device) for name in (codes, "weight_scale"))
        if format == "nvfp4":
            stored = NVFP4Tensor(weight, scales, self._weight_global_scale(layer).to(device))
            self._check(layer, stored.scales, [weight.shape[0], weight.shape[1] * 2 // BLOCK])
            self._check_block_scales(layer, stored.scales)
            return StoredLayer(stored, self._activation_global_scale(layer))
        if scales.numel() == 1:
            scales = scales.expand(weight.shape[0])
        self._check(layer, scales.reshape(scales.shape[0], -1), [weight.shape[0], 1])
        scales = scales.to(torch.float32).reshape(-1, 1)
        self._check_row_scales(layer, scales)
        return StoredLayer(RowwiseTensor(weight, scales))

    def _codes(self, layer: str) -> str | None:
        return next((name for name in _SCALES if name in self._layers.get(layer, ())), None)

    def _format_and_codes(self, layer: str) -> tuple[str, str]:
        """A layer's format, and which of its tensors holds the codes."""
        tensors, codes = self._layers[layer], self._codes(layer)
        assert codes is not None
        format = _CODES.get(tensors[codes].dtype, "unknown")
        scales = _SCALES[codes].get(format, set())
        odd = format != "bf16" and (not scales or len(tensors[codes].shape) != 2)
        if odd or set(tensors) - _PASSED_OVER != {codes, *scales}:
            raise InputError(
                f"{layer} in {self.path} is quantized in a way that mixquant does not know "
                f"({', '.join(sorted(tensors))}): use an NVFP4, FP8 or INT8 folder of compressed-tensors or ModelOpt."
            )
        return format, codes

    def _tensor(self, layer: str, tensor: str) -> Tensor:
        file = self._layers[layer][tensor].file
        with undamaged(file):
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt")
            found: Tensor = self._files[file].get_tensor(f"{layer}.{tensor}")
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind: copies and other processes open their own."""
        return vars(self) | {"_files": {}}

    def _one(self, layer: str, name: str) -> Tensor:
        """A scale of a whole layer: float32 []."""
        found = self._tensor(layer, name).to(torch.float32)
        if found.numel() != 1:
            raise InputError(
                f"{layer} in {self.path} has {name} of shape {list(found.shape)}, not one number: use a folder that "
                "compressed-tensors or ModelOpt wrote as NVFP4."
            )
        return found.reshape(())

    def _weight_global_scale(self, layer: str) -> Tensor:
        name = "weight_global_scale" if "weight_global_scale" in self._layers[layer] else "weight_scale_2"
        value = self._one(layer, name)
        inverse = 1.0 / value  # kernels divide by what multiplies here, so both must be numbers
        if not (0 < value < math.inf and 0 < inverse < math.inf):
            raise InputError(
                f"{layer} in {self.path} has {name} {float(value):g}, which no weight has: quantize the model again."
            )
        return value if name == "weight_global_scale" else inverse

    def check_activation_scales(self) -> None:
        """Raise InputError where NVFP4 activation scales cannot be what calibration found.

        One that was never calibrated (0, Inf, NaN) fails alone. A folder that stores the reciprocals of what its format
        asks for shows in the median: half of its layers' inputs would reach tens of thousands.
        """
        found = [scale for layer in self.layers() if (scale := self._activation_global_scale(layer)) is not None]
        if found and (middle := statistics.median(found)) < LOWEST_MEDIAN:
            raise InputError(
                f"{self.path} names activation scales by which inputs reach {_RANGE / middle:,.0f}: they look like the "
                f"reciprocals of what {quantized_by(self.path)} stores, so quantize the model again."
            )

    def _activation_global_scale(self, layer: str) -> float | None:
        names = [name for name in ("input_global_scale", "input_scale") if name in self._layers[layer]]
        if not names or self.format(layer) != "nvfp4":
            return None
        value = float(self._one(layer, names[0]))
        scale = value if names[0] == "input_global_scale" else 1.0 / value if value else math.inf
        if not _RANGE / LARGEST_INPUT <= scale <= _RANGE / SMALLEST_INPUT:  # NaN is neither
            raise InputError(
                f"{layer} in {self.path} has {names[0]} {value:g}, which no calibration finds: quantize the model "
                "again."
            )
        return scale

    def _check_block_scales(self, layer: str, scales: Tensor) -> None:
        """Tensor cores read block scales as unsigned E4M3: a sign is not seen, and no other type fits their tiles."""
        if scales.dtype is not torch.float8_e4m3fn:
            raise InputError(
                f"{layer} in {self.path} has block scales of {scales.dtype}, not float8_e4m3fn: use a folder that "
                "compressed-tensors or ModelOpt wrote as NVFP4."
            )
        codes = scales.view(torch.uint8)
        if bad := int(((codes == 0x7F) | (codes > 0x80)).sum()):
            raise InputError(
                f"{layer} in {self.path} has {bad} block scales that are negative or NaN, which tensor cores cannot "
                "read: quantize the model again."
            )

    def _check_row_scales(self, layer: str, scales: Tensor) -> None:
        """Zero is a row of zeros."""
        if bad := int((~(scales.isfinite() & (scales >= 0))).sum()):
            raise InputError(
                f"{layer} in {self.path} has {bad} weight scales that are negative, Inf or NaN: quantize the model "
                "again."
            )

    def _check(self, layer: str, scales: Tensor, shape: list[int]) -> None:
        if list(scales.shape) != shape:
            raise InputError(
                f"{layer} in {self.path} has weight_scale of shape {list(scales.shape)}, not {shape}: use a folder "
                "with NVFP4 blocks of 16, or with one FP8 or INT8 scale per output channel."
            )


def quantized_by(folder: Path) -> str | None:
    """The method that a checkpoint's own files say it is quantized by; None for a plain one."""
    method = quantization_config(folder).get("quant_method")
    return None if method == METHOD else method


def quantization_config(folder: Path) -> dict[str, Any]:
    """What a checkpoint's own files say of its quantization, its method included; empty for a plain one."""
    config, modelopt = folder / "config.json", folder / "hf_quant_config.json"
    document = read_object(config, REMEDY) if config.is_file() else {}
    text = document.get("text_config")
    found = document.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if not found and modelopt.is_file():
        found = read_object(modelopt, REMEDY).get("quantization")
    if found and not isinstance(found, dict):
        raise InputError(f"{config} has a quantization_config that is no object: {REMEDY}.")
    return {"quant_method": "modelopt"} | found if found else {}
