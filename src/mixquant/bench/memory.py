"""Which engines are resident together: all of them where they fit, else some at a time, each time with stock BF16.

What an engine takes is known before it starts, roughly: its weights, or the BF16 model that it quantizes at load where
that is more; a KV cache for the longest workload; and what stays around (`OVERHEAD`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixquant.bench.arms import EngineSpec
from mixquant.devices import size_text
from mixquant.policy import REFERENCE

OVERHEAD = {"cuda": 7 << 29, "cpu": 1 << 30}
"""Bytes of an engine beside weights and cache: CUDA's context, activations, graphs."""

KEPT = 0.02
"""Of the memory, what no engine may have: allocators round up."""

BYTES = {"auto": 1.0, "nvfp4": 0.5625, "fp8": 1.0, "int8": 1.0, "bf16": 2.0}
NESTED = 1.5
"""Bytes of a weight in each format, and of one that serves both phases."""


@dataclass(frozen=True)
class Sizes:
    """weights: bytes of the BF16 model; token: of one token in the KV cache; tokens: how many the cache must hold."""

    weights: int
    token: int
    tokens: int
    device: str

    @property
    def cache(self) -> int:
        """Bytes of an engine's KV cache: blocks are rounded up, and one is vLLM's own."""
        return int(self.token * (self.tokens * 1.04 + 1024))

    def engine(self, spec: EngineSpec) -> int:
        """Bytes that an engine takes, at the most while it starts."""
        at_load = self.weights + (0 if spec.policy is None else self.weights // 20)
        return max(at_load, self._weights(spec) + self.cache) + OVERHEAD[self.device]

    def _weights(self, spec: EngineSpec) -> int:
        return int(self.weights * bytes_a_weight(spec) / BYTES["bf16"])


def bytes_a_weight(spec: EngineSpec) -> float:
    """Of a quantized layer, both phases together; of `storage=auto`, what two copies would take."""
    if spec.policy is None:
        return BYTES["fp8"] if spec.method else BYTES["bf16"]
    held = spec.policy.held
    if held.decode == held.prefill:
        return BYTES[held.prefill]
    return NESTED if held.storage == "nested" else BYTES[held.prefill] + BYTES[held.decode]


def sessions(
    engines: Sequence[EngineSpec], sizes: Sizes, budget: int
) -> tuple[list[list[EngineSpec]], dict[EngineSpec, str]]:
    """Engines that run together, session by session, and why others cannot run at all.

    budget: bytes that are free. The first engine is the yardstick: it is in every session, or where nothing fits
    beside it, alone before, between and after the others.
    """
    usable = int(budget * (1 - KEPT))
    takes = {spec: sizes.engine(spec) for spec in engines}
    refused = {spec: _too_large(takes[spec], usable) for spec in engines if takes[spec] > usable}
    yardstick, *others = engines
    if yardstick in refused:
        return [], refused
    found: list[list[EngineSpec]] = [[yardstick]]
    for spec in (spec for spec in others if spec not in refused):
        if takes[yardstick] + takes[spec] > usable:
            found += [[spec], [yardstick]]
        elif sum(takes[other] for other in found[-1]) + takes[spec] <= usable and found[-1][0] == yardstick:
            found[-1].append(spec)
        else:
            found.append([yardstick, spec])
    return found, refused


def _too_large(needed: int, usable: int) -> str:
    return f"its weights and KV cache take {size_text(needed)} and {size_text(usable)} are free"


def said(found: Sequence[Sequence[EngineSpec]], names: Mapping[EngineSpec, Sequence[str]], sizes: Sizes) -> str | None:
    """That not all engines were resident together, in a sentence."""
    if len(found) < 2:
        return None
    told = "; ".join(" with ".join(name for spec in group for name in names[spec][:1]) for group in found)
    return (
        f"Memory holds not all engines at once (each keeps {size_text(sizes.cache)} of KV cache): {told}, one group "
        f"after the other, and {REFERENCE} again in each as the yardstick."
    )
