"""The quantization method `mixquant` as vLLM sees it: a configuration, and a method for each layer.

vLLM makes one `PhaseConfig` in the front process, lets it look at the model's files there, and sends it to the engine
core and the workers. A worker asks it for the method of each layer while it builds the model. What the methods then
work with is `copies.QuantizedCopies`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    _CUSTOMIZED_METHOD_TO_QUANT_CONFIG,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.integrations.vllm import METHOD, reentry, runner, stores
from mixquant.integrations.vllm.announce import Startup
from mixquant.integrations.vllm.checkpoint import Sources, resolve
from mixquant.integrations.vllm.checks import check_engine, check_version
from mixquant.integrations.vllm.copies import QuantizedCopies
from mixquant.integrations.vllm.counters import RowCounters
from mixquant.integrations.vllm.cpu import keep_order
from mixquant.integrations.vllm.fused import FusedFolder, fused_parts
from mixquant.integrations.vllm.graph_memory import GraphMemory
from mixquant.integrations.vllm.graphs import capture_more, widen_graphs
from mixquant.integrations.vllm.head import head_method
from mixquant.integrations.vllm.linear import PhaseLinearMethod
from mixquant.integrations.vllm.moe import PhaseMoEMethod
from mixquant.integrations.vllm.moe_defaults import TAIL_WITH_EXPERTS, graph_sizes, routes
from mixquant.integrations.vllm.short_prompts import min_prompt
from mixquant.integrations.vllm.step import StepState
from mixquant.layers import is_ignored
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

    def __init__(
        self, policy: Policy | None = None, prefill_weights: str | None = None, names_tail: bool = True
    ) -> None:
        """names_tail: whoever gave the policy has named its tail."""
        super().__init__()
        check_version()
        self.asked = policy, prefill_weights
        self.names_tail = names_tail
        self.widened = False
        self.checked = False
        self.counters = RowCounters()
        self.profiled: GraphMemory | None = None
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
        self.folder = None if sources.folder is None else FusedFolder(sources.folder)
        self.state = StepState(tail=self.policy.held.tail)
        self.startup = Startup(self.policy)
        self.copies = QuantizedCopies(self.policy.held, self.folder, self.state, self.startup)

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
        return cls(Policy.parse(fields) if fields else None, folder, names_tail="tail" in fields)

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
        """Resolve what depends on the model's files; vLLM calls it in the front process."""
        found = find(model_name, revision)
        sources = resolve(found, *self.asked)
        named = found.sidecar is not None if self.asked[0] is None else self.names_tail
        if not named and sources.folder is None and routes(hf_config, sources.policy):
            sources = replace(sources, policy=replace(sources.policy, tail=TAIL_WITH_EXPERTS))
            logger.info_once("mixquant tail: %d, as tokens are routed to experts; `tail` sets it", TAIL_WITH_EXPERTS)
        self.use(sources)
        reentry.install()

    @functools.cached_property
    def store_salt(self) -> str:
        """What external KV stores tell this engine's blocks by."""
        return stores.salt(self.sources, current_platform.get_device_name())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        if self.folder is not None:
            self.folder.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of one layer; vLLM calls it in the worker while it builds the model."""
        if isinstance(layer, ParallelLMHead) and prefix.endswith("lm_head"):
            ignored = is_ignored(prefix, self.policy.ignore)
            return None if ignored else head_method(self.policy.held, get_current_vllm_config())
        if not isinstance(layer, LinearBase | RoutedExperts):
            return None
        self._begin(get_current_vllm_config())
        parts = fused_parts(prefix, self.packed_modules_mapping)
        ignored = self.copies.ignores(prefix, parts)
        if isinstance(layer, RoutedExperts):
            return UnquantizedFusedMoEMethod(layer.moe_config) if ignored else self._experts_method(layer, prefix)
        if not ignored and self.folder is not None:
            ignored = self.folder.ignores(prefix, parts)
        return UnquantizedLinearMethod() if ignored else PhaseLinearMethod(self.copies, prefix, parts)

    def _experts_method(self, layer: Any, name: str) -> PhaseMoEMethod:
        if self.folder is not None:
            raise InputError(
                f"{name}: experts are quantized at load only: serve the BF16 model without prefill_weights, or add "
                '"*.experts" to `ignore`.'
            )
        if self.widened and (sizes := graph_sizes(layer.moe_config)):
            capture_more(get_current_vllm_config(), sizes)
            self.state.pure_rows = sizes[-1]
        return PhaseMoEMethod(self.copies, name, layer)

    def _begin(self, config: VllmConfig) -> None:
        """Before a worker's first layer: refuse what cannot be exact, wrap the runner, send the loader to its model."""
        runner.install()
        self.counters.open(config)
        if not self.checked:
            check_engine(config)
            self.state.short.min_prompt = min_prompt(self.policy.held)  # here, where the device is
            self.widened = widen_graphs(config)
            if current_platform.is_cpu():
                keep_order(config.compilation_config)
            self.sources.send_loader(config)
            self.checked = True
            if self.sources.folder is not None:
                logger.info_once("mixquant prefill weights: %s", self.sources.folder.path)
            if config.cache_config.cache_dtype != "auto":
                logger.info_once("mixquant KV cache: %s, made in both phases", config.cache_config.cache_dtype)
