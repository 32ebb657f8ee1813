"""The two kernels of a layer, one for each phase, and the weight that they may share.

    choose_kernels(policy, shape, device, dtype)    which kernels, and how many bytes, before there is a weight
    build(policy, weight, make)                     the kernels of a loaded weight

What is stored, in bits a weight, where decode is BF16 (16):

    storage     FP8 prompts                       NVFP4 prompts
    separate    the weight and FP8 codes: 24      the weight and FP4 codes: 20.5
    nested      plane and nibbles: 12             plane, nibbles and FP4 codes: 16.5

Where a device nests, FP8 means the plane in every arm, so that arms compare like with like: `uniform` keeps the plane
alone. A layer whose shape or escapes forbid it has separate copies, and `Built.separate` says why; under
storage=nested that is an error. FP8 codes of a quantized folder are other numbers than the plane: they stand beside the
nested weight, as NVFP4 codes do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.kernels import KERNELS, NESTED, Table, answers, choose, reasons
from mixquant.kernels.base import Accepted, LinearKernel, QuantizedKernel
from mixquant.kernels.emulation import EmulatedFP8, EmulatedPlane
from mixquant.kernels.nested import Layout, NestedKernel
from mixquant.policy import Policy

REMEDY = "use storage=separate, or add the layer to `ignore`"

Kernel = TypeVar("Kernel", bound=LinearKernel | None)


@dataclass(frozen=True)
class LayerKernels:
    """The classes of a layer's kernels.

    plane: FP8 codes are the plane of a nested weight. separate: why the weight is not nested, where others are.
    """

    prefill: type[LinearKernel]
    decode: type[LinearKernel]
    plane: bool = False
    separate: str | None = None

    @property
    def nested(self) -> bool:
        """Whether decode reads a nested weight."""
        return issubclass(self.decode, NestedKernel)

    def prepare(self, device: torch.device) -> None:
        """Begin what takes a while before there are weights."""
        if issubclass(self.decode, NestedKernel):
            self.decode.prepare(device)

    def nbytes(self, n: int, k: int, dtype: torch.dtype) -> tuple[int, int]:
        """Bytes that decode reads, and bytes that prefill adds to them."""
        shared = self.prefill is self.decode or (self.plane and self.nested)
        return self.decode.nbytes(n, k, dtype), 0 if shared else self.prefill.nbytes(n, k, dtype)

    def check(self, policy: Policy, name: str, shape: Iterable[int]) -> None:
        """Raise InputError where the layer `name` has a shape [N, K] that its policy cannot serve."""
        n, k = shape
        for kernel in (self.prefill, self.decode):
            if reason := kernel.unsupported(n, k):
                raise InputError(f"{name} of shape {[n, k]}: {reason}: add it to `ignore`.")
        if self.separate is not None and policy.storage == "nested":
            raise InputError(f"{name} of shape {[n, k]}: {self.separate}: {REMEDY}.")


class Built(NamedTuple, Generic[Kernel]):
    """The kernels of a layer; separate: why they do not share one weight, where others do."""

    prefill: LinearKernel | Kernel
    decode: LinearKernel | Kernel
    separate: str | None


def choose_kernels(
    policy: Policy,
    shape: Iterable[int],
    device: torch.device,
    dtype: torch.dtype,
    table: Table = KERNELS,
    from_folder: bool = False,
) -> LayerKernels:
    """The kernels of a weight of `shape` [N, K], whatever its name; InputError where none may run on the device.

    from_folder: the quantized copies are those of a folder.
    """
    n, k = shape
    prefill, decode = (choose(f, (n, k), device, dtype, policy, table) for f in (policy.prefill, policy.decode))
    chosen, formats = LayerKernels(prefill, decode), {prefill.format, decode.format}
    nests = decode.format == "bf16" and prefill.format in ("fp8", "nvfp4")
    plane = "fp8" in formats and not from_folder
    if policy.storage == "nested" and (decode.format == "nvfp4" or "int8" in formats):
        raise InputError(f"storage=nested serves FP8 and NVFP4 prompts, and auto is {prefill.format} here: {REMEDY}.")
    kernel = nested_kernel(policy, device, dtype) if nests or plane else None
    if kernel is None:
        return chosen
    if reason := kernel.unsupported(n, k):
        return replace(chosen, separate=reason)
    if plane:
        prefill, decode = (EmulatedPlane if found is EmulatedFP8 else found for found in (prefill, decode))
    return LayerKernels(prefill, kernel if nests else decode, plane)


def nested_kernel(policy: Policy, device: torch.device, dtype: torch.dtype) -> type[NestedKernel] | None:
    """The kernel that reads nested weights here, or None where they stay separate; InputError where that is refused.

    storage=auto takes a kernel that has been measured to pay there; storage=nested any that runs.
    """
    if policy.storage == "separate":
        return None
    asked = policy.storage == "nested"
    for kernel in NESTED:
        runs = kernel.check(device, dtype) == Accepted() and not (policy.native and kernel.emulated)
        if runs and (asked or kernel.default_on(device)):
            return kernel
    if asked:
        why = reasons(answers(NESTED, device, dtype))
        raise InputError(f"No kernel reads nested weights on {device.type} ({why}): use storage=separate.")
    return None


def build(
    policy: Policy,
    weight: Tensor,
    make: Callable[[type[LinearKernel]], Kernel],
    table: Table = KERNELS,
    from_folder: bool = False,
) -> Built[Kernel]:
    """The kernels of a weight [N, K]. Raises InputError for NaN or Inf, and where it should nest and cannot.

    make: lays out whatever is not nested; an engine with a product of its own may answer None.
    """
    chosen = choose_kernels(policy, weight.shape, weight.device, weight.dtype, table, from_folder)
    nested = _nest(policy, weight.detach()) if chosen.plane or chosen.nested else None
    if isinstance(nested, str):
        separate = replace(policy, storage="separate")
        chosen = replace(choose_kernels(separate, weight.shape, weight.device, weight.dtype, table), separate=nested)
        nested = None
    if chosen.separate is not None and policy.storage == "nested":
        raise InputError(f"{chosen.separate}: {REMEDY}.")
    made = {
        kernel: _lay_out(kernel, nested, chosen.plane, weight.dtype) or make(kernel)
        for kernel in dict.fromkeys((chosen.prefill, chosen.decode))
    }
    return Built(made[chosen.prefill], made[chosen.decode], chosen.separate)


def _nest(policy: Policy, weight: Tensor) -> Layout | str:
    """A weight laid out for the kernel that `choose_kernels` has found, or why it may not nest."""
    kernel = nested_kernel(policy, weight.device, weight.dtype)
    assert kernel is not None
    return kernel.nest(weight)


def _lay_out(kernel: type[LinearKernel], nested: Layout | None, plane: bool, dtype: torch.dtype) -> LinearKernel | None:
    """A kernel of a nested weight; None for all others."""
    if nested is None:
        return None
    if issubclass(kernel, NestedKernel):
        return kernel(nested)
    if plane and issubclass(kernel, QuantizedKernel) and kernel.format == "fp8":
        return kernel.from_quantized(nested.fp8, dtype)
    return None
