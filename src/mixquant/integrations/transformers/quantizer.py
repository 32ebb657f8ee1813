"""Transformers: `from_pretrained(..., quantization_config=MixQuantConfig(prefill="nvfp4"))`.

`MixQuantConfig(prefill_weights=DIR)` takes the quantized weights from a folder, and the BF16 ones from the model.

Importing this module registers the quantizer in Transformers' own registry. While loading, each linear layer's weight
goes straight from the checkpoint into its kernels' layouts, one layer at a time, so no plain copy of the model ever
stands beside the converted one: peak memory is the final bill plus one layer. Layers keep their names and a saved
model is the original checkpoint, with the policy beside it in `mixquant.json` and no trace in `config.json`: a
Transformers without mixquant would only warn at an unknown method and load something else than was meant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mixquant.checkpoint.prefill import PrefillWeights
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.devices import available_bytes
from mixquant.errors import InputError
from mixquant.formats.checks import check_finite
from mixquant.model.convert import Converter, check_layers, install, replace_module
from mixquant.model.memory import memory
from mixquant.model.targets import target_linears
from mixquant.policy import Policy


@register_quantization_config("mixquant")
@dataclass
class MixQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A `mixquant.Policy` for `from_pretrained`: MixQuantConfig("nvfp4"), MixQuantConfig(prefill="int8", tail=4).

    prefill_weights: a quantized folder or hub id (see `mixquant.checkpoint.prefill`), which is read while the model
    loads and determines the format. Without other arguments the policy is the one that the folder was made for, or
    `auto`. Raises InputError on unknown keys and values.
    """

    policy: Policy | None
    prefill_weights: str | QuantizedFolder | None

    def __init__(
        self,
        preset: str | Policy | None = None,
        *,
        prefill_weights: str | Path | QuantizedFolder | None = None,
        quant_method: str = "mixquant",
        **fields: Any,
    ) -> None:
        if preset is not None and fields:
            raise InputError("MixQuantConfig takes a preset or policy fields, not both.")
        self.quant_method = quant_method
        self.prefill_weights = str(prefill_weights) if isinstance(prefill_weights, Path) else prefill_weights
        asked = preset is not None or fields or prefill_weights is None
        self.policy = Policy.parse(fields if preset is None else preset) if asked else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it back."""
        folder, policy = self.prefill_weights, self.policy.to_dict() if self.policy else {}
        named = str(folder.path) if isinstance(folder, QuantizedFolder) else folder
        return {"quant_method": self.quant_method, "prefill_weights": named, **policy}


@register_quantizer("mixquant")
class MixQuantHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Converts linear layers while their weights are read."""

    requires_calibration = False
    quantization_config: MixQuantConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if self.pre_quantized:
            raise InputError(
                "The checkpoint's config.json names mixquant as its method: remove `quantization_config` there and "
                "pass MixQuantConfig to from_pretrained."
            )
        self._names: set[str] = set()
        self._failures: list[InputError] = []

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        policy, weights = self.quantization_config.policy, None
        device = _one_device(kwargs.get("device_map"))
        if self.quantization_config.prefill_weights is not None:
            weights = PrefillWeights(self.quantization_config.prefill_weights)
            policy = weights.resolve(policy)
            with torch.device("cpu"):  # the default is the meta device here
                weights.check_decode_model(_folder(checkpoint_files))
            ignored = weights.ignored(name for name, _ in target_linears(model, policy))
            policy = replace(policy, ignore=(*policy.ignore, *ignored))
        assert policy is not None  # without prefill weights there always is one
        layers = dict(target_linears(model, policy))
        check_layers(model, layers, policy, device)
        check_memory(model, policy, device, from_folder=weights is not None)
        self._converter = Converter(policy, weights)
        self._names = set(layers)
        self._shapes = {name: p.shape for name, p in model.named_parameters()}

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, _, tensor = param_name.rpartition(".")
        return tensor == "weight" and layer in self._names

    def get_quantize_ops(self) -> ConversionOps:
        return _ConvertLayer(self._converter, self._failures)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._failures:
            raise self._failures[0]
        unloaded = [name for name in self._names if isinstance(model.get_submodule(name), nn.Linear)]
        if unloaded:
            raise InputError(f"The checkpoint has no weight for {unloaded[0]}: use a complete checkpoint.")
        for name, parameter in model.named_parameters():
            if parameter.shape != self._shapes.get(name, parameter.shape):
                raise InputError(_mismatch(name, parameter, self._shapes[name]))
            check_finite(parameter.reshape(-1, parameter.shape[-1]), name)
        # Transformers stores its quantizer and config on the model; a saved model must show no trace of either.
        del model.config.quantization_config  # type: ignore[union-attr]
        install(model, self._converter)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


class _ConvertLayer(ConversionOps):  # type: ignore[misc]
    """Loads one layer: takes its weight from the checkpoint and puts a PhaseLinear in the nn.Linear's place.

    Transformers turns what is raised here into a report and a RuntimeError; so a weight that cannot be used is noted in
    `failures`, and raised after loading.
    """

    def __init__(self, converter: Converter, failures: list[InputError]) -> None:
        self._converter = converter
        self._failures = failures

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: nn.Module, missing_keys: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        name = full_layer_name.removesuffix(".weight")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            if weight.shape != (linear.out_features, linear.in_features):
                raise InputError(_mismatch(full_layer_name, weight, linear.weight.shape))
            replace_module(model, name, self._converter.convert(linear, name, weight))
        except InputError as error:
            self._failures.append(error)
            return {full_layer_name: weight}
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}  # nothing is left to assign


def _mismatch(name: str, found: Tensor, expected: torch.Size) -> str:
    return f"{name} has shape {list(found.shape)} and config.json says {list(expected)}: use files of one model."


def check_memory(model: nn.Module, policy: Policy, device: torch.device, from_folder: bool = False) -> None:
    """Raise InputError before anything is loaded where the bill exceeds the free memory."""
    bill, free = memory(model, policy, device, from_folder), available_bytes(device)
    if free is not None and bill.total_bytes > free:
        raise InputError(
            f"The converted model needs {bill.total_bytes / 2**30:.1f} GiB ({bill.decode_bytes / 2**30:.1f} decode + "
            f"{bill.prefill_bytes / 2**30:.1f} prefill) and {device} has {free / 2**30:.1f} GiB free: free memory, "
            "choose a smaller prefill format, or a smaller model."
        )


def _folder(checkpoint_files: list[str] | None) -> Path:
    if not checkpoint_files:
        raise InputError("Prefill weights need a BF16 model from a checkpoint: pass its folder to from_pretrained.")
    return Path(checkpoint_files[0]).parent


def _one_device(device_map: Any) -> torch.device:
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map or "cpu"}
    if len(devices) != 1 or devices & {"auto", "balanced", "balanced_low_0", "sequential", "disk"}:
        raise InputError("mixquant loads a model onto one device: pass device_map='cuda' or 'cpu'.")
    (device,) = devices
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
