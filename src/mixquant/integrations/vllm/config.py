"""The quantization method `mixquant`: its policy, the layers it takes, and what it refuses."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from mixquant import kernels
from mixquant.convert import NEVER
from mixquant.errors import InputError
from mixquant.integrations.vllm import METHOD, runner
from mixquant.integrations.vllm.kernels import VLLM_KERNELS
from mixquant.integrations.vllm.linear import PhaseLinearMethod, RoutedLinear, op_key
from mixquant.integrations.vllm.step import StepState
from mixquant.kernels.base import LinearKernel
from mixquant.policy import Policy

logger = init_logger(__name__)


def register_method() -> None:
    """Enter the method into vLLM's table. Raises InputError where another plugin has taken the name."""
    taken = _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(METHOD)
    if taken is None:
        register_quantization_config(METHOD)(PhaseConfig)
    elif taken is not PhaseConfig:
        raise InputError(
            f"The plugin of {taken.__module__} has taken the method {METHOD}: uninstall it, or name the plugins to "
            "load in VLLM_PLUGINS."
        )


class PhaseConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM calls a quantization config: one for each engine, shared by its layers."""

    def __init__(self, policy: Policy | None = None) -> None:
        super().__init__()
        self.policy = policy or Policy()
        self.state = StepState(tail=self.policy.tail)

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @classmethod
    def get_config_filenames(cls) -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PhaseConfig:
        """From `quantization_config` in --hf-overrides: the fields of a policy."""
        return cls(Policy.parse({key: value for key, value in config.items() if key != "quant_method"}))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; vLLM calls it in the worker while it builds the model."""
        if not isinstance(layer, LinearBase):
            return None
        runner.install()
        if self.spares(prefix):
            return UnquantizedLinearMethod()
        return PhaseLinearMethod(self, prefix)

    def spares(self, name: str) -> bool:
        """Whether a layer stays BF16 in every phase."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in (*NEVER, *self.policy.ignore))

    def check_layer(self, name: str, weight: Tensor) -> None:
        """Raise InputError where no kernel can take a layer's shape."""
        for format in (self.policy.prefill, self.policy.decode):
            kernel = self._choose(format, weight)
            if reason := kernel.unfit(*weight.shape):
                raise InputError(f"{name} of shape {list(weight.shape)}: {reason}: add it to `ignore`.")

    def make_kernel(self, format: str, name: str, weight: Tensor, amax: Tensor | None) -> LinearKernel | None:
        """The kernel for a layer's loaded weight; None means vLLM's own BF16."""
        kernel = self._choose(format, weight)
        if kernel.format == "bf16":
            return None
        try:
            return kernel.from_weight(weight.data, self.policy.scales, amax)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _choose(self, format: str, weight: Tensor) -> type[LinearKernel]:
        return kernels.choose(format, weight.shape, weight.device, weight.dtype, self.policy, VLLM_KERNELS)

    def add_layer(self, name: str, routed: RoutedLinear, nbytes: int) -> None:
        """Make a routed layer known to the op."""
        get_current_vllm_config().compilation_config.static_forward_context[op_key(name)] = routed
