"""The quantized copies of a model's layers: which layers get one, by which kernel, and how they are made.

vLLM asks its quantization config for a method for each layer (config.py) and calls that method to create, load and
apply the layer (linear.py, moe.py). All of them are given the one `QuantizedCopies` of their engine.

A copy is made of the layer's loaded weight, as vLLM has fused and sharded it, or read from a quantized folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_pp_group

from mixquant.errors import InputError
from mixquant.formats import quantizer
from mixquant.integrations.vllm.announce import Startup
from mixquant.integrations.vllm.checks import PARTIAL
from mixquant.integrations.vllm.fused import FusedFolder
from mixquant.integrations.vllm.kernels import VLLM_KERNELS
from mixquant.integrations.vllm.parallel import weight_amax
from mixquant.integrations.vllm.routed import RoutedLinear, enter
from mixquant.integrations.vllm.step import StepState
from mixquant.kernels.base import LinearKernel, QuantizedKernel
from mixquant.kernels.layer import Built, LayerKernels, build, choose_kernels
from mixquant.layers import NEVER, check_patterns, is_ignored
from mixquant.policy import Policy

Copy = TypeVar("Copy")


@dataclass(frozen=True)
class QuantizedCopies:
    """What the layers of one engine are quantized by; `folder` holds their copies, if they are not made at load."""

    policy: Policy
    folder: FusedFolder | None
    state: StepState
    startup: Startup
    _asked: set[str] = field(default_factory=lambda: {"lm_head"}, init=False)  # layers that vLLM asked about

    def ignores(self, name: str, parts: Sequence[str]) -> bool:
        """Whether the rule or `ignore` leaves a layer in BF16 in every phase; `parts` are the layers fused into it.

        Raises InputError where `ignore` names some of the parts only.
        """
        self._asked.update((name, *parts))
        if is_ignored(name, (*NEVER, *PARTIAL, *self.policy.ignore)):
            return True
        ignored = [part for part in parts if is_ignored(part, self.policy.ignore)]
        if ignored and len(ignored) < len(parts):
            raise InputError(
                f"`ignore` names {', '.join(ignored)}, which vLLM fuses into {name}: name all of its parts "
                f"({', '.join(parts)}), or none."
            )
        return bool(ignored)

    def expect(self, name: str, weight: Tensor) -> None:
        """A linear layer has been created: check that kernels can take its shape, and enter it into the memory bill."""

        # Not the weight itself: who keeps it keeps its memory, when nobody multiplies by it any more.
        (n, k), device, dtype, plain = weight.shape, weight.device, weight.dtype, weight.nbytes

        def added(format: str) -> int:
            chosen = self._choose(self.policy.in_format(format), (n, k), device, dtype)
            return sum(chosen.nbytes(n, k, dtype)) - plain

        chosen = self._choose(self.policy, (n, k), device, dtype)
        chosen.check(self.policy, name, (n, k))
        chosen.prepare(device)
        self.startup.expect(name, weight.nbytes, added)

    def by_phase(self, name: str, make: Callable[[str], Copy | None]) -> tuple[Copy | None, Copy | None]:
        """A loaded layer's copy for prefill and for decode rows: the same one where both phases have one format.

        make: format -> copy, None for formats in which the layer keeps vLLM's own product.
        """
        with self._making(name):
            made = {format: make(format) for format in dict.fromkeys((self.policy.prefill, self.policy.decode))}
        return made[self.policy.prefill], made[self.policy.decode]

    def linear(self, name: str, parts: Sequence[str], layer: nn.Module) -> Built[LinearKernel | None]:
        """The kernels of a linear layer's loaded weight; None means vLLM's own BF16 product."""
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        with self._making(name):
            make = functools.partial(self._copy, parts, layer, weight)
            return build(self.policy, weight, make, VLLM_KERNELS, from_folder=self.folder is not None)

    @contextmanager
    def _making(self, name: str) -> Iterator[None]:
        """Around the making of a layer's copies: first what stands against all of them, then whose error it is."""
        self.startup.check_capacity()
        if self.folder is None and get_pp_group().world_size == 1:  # else another rank or the folder may have the layer
            check_patterns(self.policy.ignore, self._asked)
        try:
            yield
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _copy(
        self, parts: Sequence[str], layer: nn.Module, weight: Tensor, kernel: type[LinearKernel]
    ) -> LinearKernel | None:
        if not issubclass(kernel, QuantizedKernel):
            return None
        if self.folder is None:
            return kernel.from_weight(weight, quantizer(kernel.format, self.policy.scales, weight_amax(layer, weight)))
        stored = self.folder.read(parts, layer)
        return kernel.from_quantized(stored.weight, weight.dtype, stored.activation_global_scale)

    def _choose(self, policy: Policy, shape: Iterable[int], device: torch.device, dtype: torch.dtype) -> LayerKernels:
        return choose_kernels(policy, shape, device, dtype, VLLM_KERNELS, self.folder is not None)

    def add(self, name: str, layer: RoutedLinear[Any], separate: str | None = None) -> None:
        """A layer has its copies: let the op find it, and the log count it. separate: why it is not nested, where
        others are."""
        enter(name, layer)
        self.startup.loaded(name, layer, separate)
