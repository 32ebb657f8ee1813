"""Kernels: which code multiplies by a quantized weight on this device, and why.

Selection order: within a format, native kernels come before emulation, and the first that answers Accepted is taken.
`auto` takes the first format of nvfp4, fp8, int8 that has a native kernel on the device. Both phases of a layer may
share one weight, for which `layer` chooses. A choice may depend on the device and on a layer's N and K, never on the
number of rows: a layer that the first native kernel cannot lay out gets the next native one that can. Nothing falls
back in silence: every layer names its kernel, emulation never stands in for a shape, and a policy with `native=True`
refuses it altogether.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from mixquant.errors import InputError
from mixquant.kernels.base import Accepted, LinearKernel, Rejected, Verdict
from mixquant.kernels.cpu import Int8OneDNN, PackedOneDNN
from mixquant.kernels.cuda import FP8ScaledMM, NVFP4DotScaled, NVFP4ScaledMM
from mixquant.kernels.dense import Dense
from mixquant.kernels.emulation import EmulatedFP8, EmulatedInt8, EmulatedNVFP4
from mixquant.kernels.nested import EmulatedNested, NestedKernel
from mixquant.kernels.nested_cuda import NestedCUDA
from mixquant.policy import QUANTIZED, Policy

__all__ = [
    "NESTED",
    "Accepted",
    "Candidate",
    "LinearKernel",
    "Rejected",
    "Table",
    "Verdict",
    "answers",
    "candidates",
    "choose",
    "reasons",
    "resolve_format",
    "select",
]

Table = Mapping[str, tuple[type[LinearKernel], ...]]
"""Kernels by format, in order of preference; an engine with kernels of its own brings a table of its own."""

KERNELS: Table = {
    "nvfp4": (NVFP4ScaledMM, NVFP4DotScaled, EmulatedNVFP4),
    "fp8": (FP8ScaledMM, EmulatedFP8),
    "int8": (Int8OneDNN, EmulatedInt8),
    "bf16": (PackedOneDNN, Dense),
}

NESTED: tuple[type[NestedKernel], ...] = (NestedCUDA, EmulatedNested)
"""Kernels of nested weights, in order of preference."""


@dataclass(frozen=True)
class Candidate:
    """A kernel and its answer on a device."""

    kernel: type[LinearKernel]
    verdict: Verdict


def candidates(format: str, device: torch.device, dtype: torch.dtype, table: Table = KERNELS) -> list[Candidate]:
    """All kernels of a format in order of preference, each with its verdict."""
    return answers(table[format], device, dtype)


def answers(kernels: Iterable[type[LinearKernel]], device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """Kernels with their verdicts."""
    return [Candidate(kernel, kernel.check(device, dtype)) for kernel in kernels]


def reasons(candidates: Iterable[Candidate]) -> str:
    """Why none of some kernels is taken, for an error."""
    return "; ".join(
        f"{c.kernel.name}: {c.verdict.reason if isinstance(c.verdict, Rejected) else 'emulated'}" for c in candidates
    )


def select(
    format: str,
    device: torch.device,
    dtype: torch.dtype,
    native: bool = False,
    table: Table = KERNELS,
    shape: tuple[int, int] | None = None,
) -> type[LinearKernel]:
    """The kernel that runs `format` for activations of `dtype` on `device`; InputError where none may.

    shape: [N, K] of a weight. Where the first kernel cannot lay it out, the next of its kind that can; or the last,
    whose `unsupported` says what none of them can.
    """
    running = (kernel for kernel in table[format] if _runs(kernel, device, dtype) and not (native and kernel.emulated))
    first = next(running, None)
    if first is None:
        raise InputError(
            f"No {'native ' if native else ''}kernel runs {format} on {device.type} "
            f"({reasons(candidates(format, device, dtype, table))}): "
            f"choose another format{', or allow emulation' if native else ''}."
        )
    if shape is None or first.unsupported(*shape) is None:
        return first
    others = [kernel for kernel in running if kernel.emulated == first.emulated]
    return next((kernel for kernel in others if kernel.unsupported(*shape) is None), others[-1] if others else first)


def _runs(kernel: type[LinearKernel], device: torch.device, dtype: torch.dtype) -> bool:
    """Asked one by one: an answer may take a compiler's time."""
    return isinstance(kernel.check(device, dtype), Accepted)


def resolve_format(format: str, device: torch.device, dtype: torch.dtype, table: Table = KERNELS) -> str:
    """Turn `auto` into the fastest format with a native kernel here; others pass."""
    if format != "auto":
        return format
    for name in QUANTIZED:
        if any(not kernel.emulated and _runs(kernel, device, dtype) for kernel in table[name]):
            return name
    raise InputError(
        f"auto finds no native quantized kernel for {dtype} on {device.type}: choose a format by name to emulate it "
        f"({', '.join(QUANTIZED)}), or run on a device that has one (see `mixquant doctor`)."
    )


def choose(
    format: str, shape: Iterable[int], device: torch.device, dtype: torch.dtype, policy: Policy, table: Table = KERNELS
) -> type[LinearKernel]:
    """The kernel for a weight of `shape` [N, K]. `auto` leaves layers where quantizing does not pay in BF16."""
    resolved = resolve_format(format, device, dtype, table)
    n, k = shape
    kernel = select(resolved, device, dtype, policy.native and resolved != "bf16", table, (n, k))
    ignored = format == "auto" and (kernel.unsupported(n, k) is not None or not kernel.pays(n, k))
    return select("bf16", device, dtype, table=table) if ignored else kernel
