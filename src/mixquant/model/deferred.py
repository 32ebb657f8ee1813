"""What a linear layer reads, before it is computed: the output of a norm or of a SwiGLU, with all that makes it.

What. `Deferred` is a tensor to every operation but one: PhaseLinear takes its rows instead, and has prompt rows
computed and quantized to NVFP4 by one kernel, without the way through memory in between. Rows of BF16 are computed by
the model's own code, as ever.
How. A wrapper subclass without memory of its own. Any operation that meets it computes it first, and from then on it is
what was computed, for PhaseLinear too. Layers that read one norm share its codes.
Trade-off. Between norm and layer nobody may write to the norm's input in place, which torch could not tell us within
inference_mode; models add residuals after the layers, and not in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Operands = tuple[Tensor, Tensor]
"""NVFP4 codes and scales, as `kernels.cuda.NVFP4ScaledMM.multiply` takes them."""


class DeferredRows(Protocol):
    """A matrix [rows, K] that is not computed yet."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, rows: slice, /) -> Self: ...

    def index_select(self, dim: int, index: Tensor) -> Self: ...

    def new_empty(self, *shape: int) -> Tensor: ...

    def compute(self) -> Tensor:
        """The rows in the model's dtype, by the model's own code."""

    def quantize(self, global_scale: float) -> Operands:
        """The rows in NVFP4, by one kernel."""


@dataclass(frozen=True, eq=False)
class Normed:
    """RMSNorm of x [rows, K]. norm: the module's own forward. Its codes are kept for the next layer that reads it."""

    x: Tensor
    weight: Tensor
    epsilon: float
    norm: Callable[[Tensor], Tensor]
    _codes: dict[float, Operands] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __getitem__(self, rows: slice, /) -> Normed:
        return Normed(self.x[rows], self.weight, self.epsilon, self.norm)

    def index_select(self, dim: int, index: Tensor) -> Normed:
        return Normed(self.x.index_select(dim, index), self.weight, self.epsilon, self.norm)

    def new_empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(*shape)

    def compute(self) -> Tensor:
        return self.norm(self.x)

    def quantize(self, global_scale: float) -> Operands:
        from mixquant.kernels import nvfp4_fused, nvfp4_quantizer  # Triton comes with CUDA builds of torch only

        if global_scale not in self._codes:
            hardware = nvfp4_quantizer.rounds_in_hardware(self.device)
            arguments = self.x, self.weight, self.epsilon, global_scale, hardware
            self._codes[global_scale] = nvfp4_fused.quantize_rms_norm(*arguments)
        return self._codes[global_scale]


@dataclass(frozen=True, eq=False)
class Gated:
    """silu(gate) * up of two matrices [rows, K]."""

    gate: Tensor
    up: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.gate.shape

    @property
    def device(self) -> torch.device:
        return self.gate.device

    def __getitem__(self, rows: slice, /) -> Gated:
        return Gated(self.gate[rows], self.up[rows])

    def index_select(self, dim: int, index: Tensor) -> Gated:
        return Gated(self.gate.index_select(dim, index), self.up.index_select(dim, index))

    def new_empty(self, *shape: int) -> Tensor:
        return self.gate.new_empty(*shape)

    def compute(self) -> Tensor:
        return torch.nn.functional.silu(self.gate) * self.up

    def quantize(self, global_scale: float) -> Operands:
        from mixquant.kernels import nvfp4_fused, nvfp4_quantizer  # Triton comes with CUDA builds of torch only

        hardware = nvfp4_quantizer.rounds_in_hardware(self.device)
        return nvfp4_fused.quantize_silu_mul(self.gate, self.up, global_scale, hardware)


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
