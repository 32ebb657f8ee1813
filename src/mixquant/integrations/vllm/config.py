"""The quantization method `mixquant`: its policy, the layers it takes, and what it refuses."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from mixquant import kernels
from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.integrations.vllm import METHOD, runner, stores
from mixquant.integrations.vllm.announce import Startup
from mixquant.integrations.vllm.checkpoint import PrefillWeights, Sources, fused_parts, resolve
from mixquant.integrations.vllm.checks import PARTIAL, check_engine, check_version
from mixquant.integrations.vllm.counters import RowCounters
from mixquant.integrations.vllm.kernels import VLLM_KERNELS
from mixquant.integrations.vllm.linear import PhaseLinearMethod, RoutedLinear, op_key
from mixquant.integrations.vllm.moe import PhaseMoEMethod
from mixquant.integrations.vllm.parallel import weight_amax
from mixquant.integrations.vllm.step import StepState, widen_graphs
from mixquant.kernels.base import LinearKernel, QuantizedKernel
from mixquant.layers import NEVER
from mixquant.policy import Policy

logger = init_logger(f"vllm.{__name__}")


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

    def __init__(self, policy: Policy | None = None, prefill_weights: str | None = None) -> None:
        super().__init__()
        check_version()
        self.asked = policy, prefill_weights
        self.checked = False
        self.counters = RowCounters()
        self.use(Sources(policy or Policy()))
        stores.install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process: the engine core's, or a worker's."""
        self.__dict__.update(state)
        stores.install()

    def use(self, sources: Sources) -> None:
        """Take the policy, and where the weights come from."""
        self.sources = sources
        self.policy = sources.policy
        self.prefill_weights = None if sources.folder is None else PrefillWeights(sources.folder)
        self.state = StepState(tail=self.policy.tail, counters=self.counters)
        self.startup = Startup(self.policy)

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
        """From `quantization_config` in --hf-overrides: the fields of a policy, and `prefill_weights`, a folder."""
        fields = {key: value for key, value in config.items() if key not in ("quant_method", "prefill_weights")}
        folder = config.get("prefill_weights")
        if not isinstance(folder, str | None):
            raise InputError(f"prefill_weights is the name of a quantized folder, not {folder!r}.")
        return cls(Policy.parse(fields) if fields else None, folder)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim a checkpoint of another method where the user names ours; vLLM must then see nothing of the other, such
        as its KV cache's precision."""
        if user_quant != METHOD or hf_quant_cfg.get("quant_method") == METHOD:
            return None
        hf_config.quantization_config = {"quant_method": METHOD}
        return METHOD

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Settle what depends on the model's files; vLLM calls it in the front process."""
        self.use(resolve(find(model_name, revision), *self.asked))

    @functools.cached_property
    def store_salt(self) -> str:
        """What external KV stores tell this engine's blocks by."""
        return stores.salt(self.sources, current_platform.get_device_name())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if self.prefill_weights is not None:
            self.prefill_weights.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; vLLM calls it in the worker while it builds the model."""
        if not isinstance(layer, LinearBase | RoutedExperts):
            return None
        self._begin(get_current_vllm_config())
        spared = self.spares(prefix)
        if isinstance(layer, RoutedExperts):
            if self.prefill_weights is not None and not spared:
                raise InputError(
                    f"{prefix}: experts are quantized at load only: serve the BF16 model without prefill_weights, or "
                    'add "*.experts" to `ignore`.'
                )
            return UnquantizedFusedMoEMethod(layer.moe_config) if spared else PhaseMoEMethod(self, prefix, layer)
        if not spared and self.prefill_weights is not None:
            spared = self.prefill_weights.spares(prefix, self.packed_modules_mapping)
        return UnquantizedLinearMethod() if spared else PhaseLinearMethod(self, prefix)

    def _begin(self, config: VllmConfig) -> None:
        """Before a worker's first layer: refuse what cannot be exact, wrap the runner, send the loader to its model."""
        runner.install()
        self.counters.open(config)
        if not self.checked:
            check_engine(config)
            widen_graphs(config)
            self.sources.send_loader(config)
            self.checked = True
            if self.sources.folder is not None:
                logger.info_once("mixquant prefill weights: %s", self.sources.folder.path)
            if config.cache_config.cache_dtype != "auto":
                logger.info_once("mixquant KV cache: %s, made in both phases", config.cache_config.cache_dtype)

    def spares(self, name: str) -> bool:
        """Whether the rule or `ignore` leaves a layer in BF16 in every phase."""
        if _matches(name, (*NEVER, *PARTIAL, *self.policy.ignore)):
            return True
        parts = fused_parts(name, self.packed_modules_mapping)
        ignored = [part for part in parts if _matches(part, self.policy.ignore)]
        if ignored and len(ignored) < len(parts):
            raise InputError(
                f"`ignore` names {', '.join(ignored)}, which vLLM fuses into {name}: name all of its parts "
                f"({', '.join(parts)}), or none."
            )
        return bool(ignored)

    def expect_layer(self, name: str, weight: Tensor) -> None:
        """Check that kernels can take a created layer's shape, and enter it into the memory bill."""

        def copy_bytes(format: str) -> int:
            kernel = self._choose(format, weight)
            return 0 if kernel.format == "bf16" else kernel.nbytes(n, k, weight.dtype)

        n, k = weight.shape
        for format in (self.policy.prefill, self.policy.decode):
            if reason := self._choose(format, weight).unfit(n, k):
                raise InputError(f"{name} of shape {[n, k]}: {reason}: add it to `ignore`.")
        self.startup.expect(name, weight.nbytes, copy_bytes)

    def make_kernel(self, format: str, name: str, layer: nn.Module) -> LinearKernel | None:
        """The kernel for a layer's loaded weight; None means vLLM's own BF16."""
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        kernel = self._choose(format, weight)
        if kernel.format == "bf16":
            return None
        try:
            if self.prefill_weights is None:
                return kernel.from_weight(weight, self.policy.scales, weight_amax(layer, weight))
            assert issubclass(kernel, QuantizedKernel)
            stored = self.prefill_weights.read(name, layer, self.packed_modules_mapping)
            return kernel.from_quantized(stored.weight, weight.dtype, stored.activation_global_scale)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _choose(self, format: str, weight: Tensor) -> type[LinearKernel]:
        return kernels.choose(format, weight.shape, weight.device, weight.dtype, self.policy, VLLM_KERNELS)

    def add_layer(self, name: str, routed: RoutedLinear) -> None:
        """Make a routed layer known to the op."""
        get_current_vllm_config().compilation_config.static_forward_context[op_key(name)] = routed
        self.startup.loaded(name, routed)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
