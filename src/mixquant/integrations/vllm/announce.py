"""What an engine says once its weights are loaded: policy, kernel of each phase, memory bill; one log line each.

The bill is known from the layers' shapes before anything is quantized. So weights that do not fit beside their copies
are refused before the first copy is made, with the contexts that would fit, and not by the allocator halfway. What is
left for the KV cache is an upper bound: vLLM measures later what activations and CUDA graphs take.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec

from mixquant.devices import available_bytes, size_text
from mixquant.errors import InputError
from mixquant.integrations.vllm.routed import RoutedLinear
from mixquant.integrations.vllm.short_prompts import min_prompt
from mixquant.kernels.nested import NestedKernel
from mixquant.model.memory import unique_storages
from mixquant.policy import QUANTIZED, Policy

logger = init_logger(f"vllm.{__name__}")

DTYPES = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}

AddedBytes = Callable[[str], int]
"""Bytes that a layer takes beyond its own weight, quantized to a format; less than 0 where they replace it."""


@dataclass
class _Layer:
    plain: int  # bytes of the model's own weight
    added: AddedBytes
    routed: RoutedLinear[Any] | None = None  # once it is quantized
    separate: str | None = None  # why it is not nested, where others are

    def held(self) -> int:
        """Bytes of both products; vLLM's own is the model's weight."""
        assert self.routed is not None
        products = {self.routed.prefill, self.routed.decode}
        kernels = [product for product in products if hasattr(product, "tensors")]
        copies = unique_storages(chain.from_iterable(kernel.tensors() for kernel in kernels))
        return sum(copies.values()) + (self.plain if len(kernels) < len(products) else 0)


class Startup:
    """The routed layers of one rank, from the creation of the first to the quantization of the last."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.format = policy.decode if policy.prefill == "bf16" else policy.prefill  # a policy has one at most
        self._layers: dict[str, _Layer] = {}

    def expect(self, name: str, plain: int, added: AddedBytes) -> None:
        """A layer has been created, whose own weight takes `plain` bytes."""
        self._layers[name] = _Layer(plain, added)

    def check_capacity(self) -> None:
        """A layer is about to be quantized: before the first, raise InputError if not all of them fit."""
        if any(layer.routed for layer in self._layers.values()):
            return
        config = get_current_vllm_config()
        free, needed = free_bytes(config), needed_bytes(config)
        if free is not None and free - self._added(self.format) < needed:
            kept = sum(layer.plain for layer in self._layers.values())
            raise InputError(
                f"Weights, quantized copies and KV cache do not fit: {size_text(kept)} of linear layers are loaded, "
                f"{self.format} {_change(self._added(self.format))}, the KV cache needs {size_text(needed)}, "
                f"and {size_text(free)} are free: {self._remedy(free, token_bytes(config))}."
            )

    def loaded(self, name: str, routed: RoutedLinear[Any], separate: str | None) -> None:
        """A layer has been quantized; after the last one come the log lines, once for all tensor-parallel ranks."""
        self._layers[name].routed, self._layers[name].separate = routed, separate
        if all(layer.routed for layer in self._layers.values()) and get_tensor_model_parallel_rank() == 0:
            config = get_current_vllm_config()
            dtype = DTYPES[config.model_config.dtype]
            in_force = self.policy.to_dict() | {"min_prompt": min_prompt(self.policy.held)}
            logger.info("mixquant policy: %s", ", ".join(f"{k}={v}" for k, v in in_force.items()))
            logger.info(
                "mixquant kernels: prefill %s, decode %s",
                *(self._kernels(phase, f"vLLM {dtype}") for phase in ("prefill", "decode")),
            )
            if short := self._short_prompts(dtype):
                logger.info("mixquant short prompts: %s", short)
            if storage := self._storage():
                logger.info("mixquant storage: %s", storage)
            logger.info("mixquant memory: %s", self._bill(config, dtype))

    def _added(self, format: str) -> int:
        """Bytes that quantizing adds; less than 0 where no phase needs the model's own weight any more."""
        return sum(layer.added(format) for layer in self._layers.values())

    def _short_prompts(self, dtype: str) -> str:
        """Which prompts are read precisely; nothing where none is."""
        fewest = min_prompt(self.policy.held)
        if not fewest:
            return ""
        format = dtype if self.policy.decode == "bf16" else self.policy.decode
        default = ", the default on this device; 0 switches it off" if self.policy.min_prompt is None else ""
        return f"those of fewer than {fewest} new tokens are read in {format} (min_prompt{default})"

    def _storage(self) -> str:
        """How many layers have one weight for both phases, and why not all; nothing where none could."""
        nested = sum(isinstance(getattr(layer.routed, "decode", None), NestedKernel) for layer in self._layers.values())
        separate = {name: layer.separate for name, layer in self._layers.items() if layer.separate is not None}
        said = f"{nested} of {len(self._layers)} layers nested"
        if separate:
            name, reason = next(iter(separate.items()))
            return f"{said}, {len(separate)} keep separate weights for prefill and decode, first {name}: {reason}"
        return said if nested else ""

    def _remedy(self, free: int, token: int) -> str:
        """What to change; with the longest context that fits in each format, where contexts take memory."""
        remedy = "choose a smaller format, add layers to `ignore`, or spread the model over more devices"
        if not token:
            return remedy
        longest: dict[str, int] = {}
        for format in (self.format, *QUANTIZED, "bf16"):
            with contextlib.suppress(InputError):  # no kernel for this format here
                longest[format] = max(0, free - self._added(format)) // token
        fits = ", ".join(f"{tokens:,} in {format}" for format, tokens in longest.items())
        return f"ask for less context (the longest that fits: {fits}), {remedy}"

    def kernels(self, phase: str, plain: str) -> Counter[tuple[str, bool]]:
        """How many layers run each kernel in a phase, by its name and whether it is emulated.

        plain: what to call vLLM's own product of layers that are not quantized in this phase.
        """
        products = [getattr(layer.routed, phase) for layer in self._layers.values()]
        return Counter((getattr(p, "name", plain), getattr(p, "emulated", False)) for p in products)

    def _kernels(self, phase: str, plain: str) -> str:
        counts = self.kernels(phase, plain).items()
        return " + ".join(f"{name} ({n} layers{', emulated' if emulated else ''})" for (name, emulated), n in counts)

    def _bill(self, config: VllmConfig, dtype: str) -> str:
        kept, held = (sum(sizes) for sizes in zip(*((x.plain, x.held()) for x in self._layers.values()), strict=True))
        rank = " on this rank" if config.parallel_config.world_size > 1 else ""
        bits = 8 * config.model_config.dtype.itemsize * held / kept
        text = f"{size_text(kept)} of linear layers in {dtype}{rank}, quantization {_change(held - kept)}"
        text += f" ({bits:.1f} bits a weight)"
        free, limit, token = free_bytes(config), config.cache_config.kv_cache_memory_bytes, token_bytes(config)
        if free is None:
            return text
        cache = free if limit is None else min(free, limit)
        tokens = f" or {cache // token:,} tokens" if token else ""
        left = f"{size_text(free)} are left: KV cache of at most {size_text(cache)}{tokens}"
        return f"{text}, {left}, before vLLM's own profiling"


def _change(added: int) -> str:
    return f"adds {size_text(added)}" if added >= 0 else f"saves {size_text(-added)}"


def free_bytes(config: VllmConfig) -> int | None:
    """Bytes that quantized copies and KV cache may take on this rank's device; None where that cannot be told."""
    device = torch.device(config.device_config.device_type)
    free = available_bytes(device)
    if free is None or device.type != "cuda":
        return free
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    if config.cache_config.kv_cache_memory_bytes is not None:  # then vLLM does not look at the utilization
        return free
    total = torch.cuda.get_device_properties(device).total_memory
    return min(free, int(config.cache_config.gpu_memory_utilization * total) - allocated)


def token_bytes(config: VllmConfig) -> int:
    """Bytes of KV cache that one more token takes on this rank: of layers that attend to the whole context."""
    layers = get_layers_from_vllm_config(config, AttentionLayerBase).values()
    own = (layer for layer in layers if not getattr(layer, "kv_sharing_target_layer_name", None))
    specs = (layer.get_kv_cache_spec(config) for layer in own)
    total = sum(s.page_size_bytes / s.block_size for s in specs if isinstance(s, FullAttentionSpec))
    return int(total / config.parallel_config.decode_context_parallel_size)


def needed_bytes(config: VllmConfig) -> int:
    """The smallest KV cache that vLLM will start with: what was asked for, or one request of the longest context."""
    asked: int | None = config.cache_config.kv_cache_memory_bytes
    model = config.model_config
    context = 1 if model.original_max_model_len == -1 else model.max_model_len  # -1: as long as fits
    return token_bytes(config) * context if asked is None else asked
