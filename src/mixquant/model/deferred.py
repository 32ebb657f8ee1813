"""What a linear layer reads, before it is computed: the output of a norm or of a SwiGLU, with all that makes it.

What. `Deferred` is a tensor to every operation but one: PhaseLinear takes its rows instead, and has prompt rows
computed and quantized to NVFP4 by one kernel, without the way through memory in between. Rows of BF16 are computed by
the model's own code, as ever.
How. A wrapper subclass without memory of its own. Any operation that meets it computes it first, and from then on it is
what was computed, for PhaseLinear too. Layers that read one norm share its codes.
Trade-off. Between norm and layer nobody may write to the norm's input in place, which torch could not tell us within
inference_mode; models add residuals after the layers, and not in place. And a kernel that the model launches itself on
a norm's output, by its address, finds none: that is an error and no wrong number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Operands = tuple[Tensor, Tensor]
"""NVFP4 codes and scales, as `kernels.cuda.NVFP4ScaledMM.multiply` takes them."""


@dataclass(frozen=True, eq=False)
class DeferredRows(ABC):
    """A matrix [rows, K] that is not computed yet. inputs: of its shape, each row of which makes a row."""

    inputs: tuple[Tensor, ...]
    _codes: dict[float, Operands] = field(default_factory=dict, init=False, repr=False)

    @property
    def shape(self) -> torch.Size:
        return self.inputs[0].shape

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def __getitem__(self, rows: slice, /) -> Self:
        return replace(self, inputs=tuple(x[rows] for x in self.inputs))

    def index_select(self, dim: int, index: Tensor) -> Self:
        return replace(self, inputs=tuple(x.index_select(dim, index) for x in self.inputs))

    def new_empty(self, *shape: int) -> Tensor:
        return self.inputs[0].new_empty(*shape)

    @abstractmethod
    def compute(self) -> Tensor:
        """The rows in the model's dtype, by the model's own code."""

    def quantize(self, global_scale: float) -> Operands:
        """The rows in NVFP4, by one kernel; kept for the next layer that reads them."""
        from mixquant.kernels.nvfp4_quantizer import rounds_in_hardware  # Triton comes with CUDA builds of torch only

        if global_scale not in self._codes:
            self._codes[global_scale] = self._quantize(global_scale, rounds_in_hardware(self.device))
        return self._codes[global_scale]

    @abstractmethod
    def _quantize(self, global_scale: float, hardware: bool) -> Operands: ...


@dataclass(frozen=True, eq=False)
class Normed(DeferredRows):
    """RMSNorm of one matrix. norm: the module's own forward."""

    weight: Tensor
    epsilon: float
    norm: Callable[[Tensor], Tensor]

    def compute(self) -> Tensor:
        return self.norm(self.inputs[0])

    def _quantize(self, global_scale: float, hardware: bool) -> Operands:
        from mixquant.kernels.nvfp4_fused import quantize_rms_norm

        return quantize_rms_norm(self.inputs[0], self.weight, self.epsilon, global_scale, hardware)


@dataclass(frozen=True, eq=False)
class Gated(DeferredRows):
    """silu(gate) * up of two matrices."""

    def compute(self) -> Tensor:
        gate, up = self.inputs
        return nn.functional.silu(gate) * up

    def _quantize(self, global_scale: float, hardware: bool) -> Operands:
        from mixquant.kernels.nvfp4_fused import quantize_silu_mul

        gate, up = self.inputs
        return quantize_silu_mul(gate, up, global_scale, hardware)


class Deferred(Tensor):
    """Rows as the tensor [..., K] that they will be."""

    rows: DeferredRows
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, rows: DeferredRows, like: Tensor) -> Deferred:
        shape = (*like.shape[:-1], rows.shape[1])
        made: Deferred = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.rows, made._computed = rows, None
        return made

    def __init__(self, rows: DeferredRows, like: Tensor) -> None:
        """like: a tensor of the same leading dimensions, dtype and device."""

    @property
    def pending(self) -> DeferredRows | None:
        """The rows, as long as nothing but a linear layer has read them."""
        return self.rows if self._computed is None else None

    def computed(self) -> Tensor:
        if self._computed is None:
            self._computed = self.rows.compute().view(self.shape)
        return self._computed

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        given = tree_map_only(Deferred, Deferred.computed, (args, kwargs or {}))
        return operation(*given[0], **given[1])
