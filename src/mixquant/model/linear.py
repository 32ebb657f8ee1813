"""PhaseLinear: two weights and one dispatch.

What. A drop-in for nn.Linear that multiplies prompt rows by a quantized weight and all other rows by the checkpoint's
own. Which rows are which is not decided here: the model's `PhaseState` holds the plan of the forward that runs now (see
`tracking`), and `phase` makes it.
How. A batch of one phase is one product. A batch of both is two (`mixed_product`): a quantized one over the span of
rows that holds every prompt row, and a precise one over the decode rows, whose results overwrite the others.
Trade-off. The decode rows inside the span are multiplied twice, for nothing. The alternative, to gather the prompt
rows, copies a large activation to save a few rows of a large product. So only decode rows, which are few, are gathered,
by one index that all layers of a forward share. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from mixquant.errors import InputError
from mixquant.kernels.base import LinearKernel, PlainKernel
from mixquant.kernels.cuda import NVFP4ScaledMM
from mixquant.kernels.streams import side_by_side
from mixquant.model.deferred import Deferred, DeferredRows
from mixquant.model.readonly import WRITTEN, ReadOnly
from mixquant.phase import DECODE_ONLY, Phase, Plan


class Rows(Protocol):
    """What is asked of a matrix of rows [rows, K]. A Tensor is one; so is whatever carries more than numbers in a row,
    such as the experts that each row goes to."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def __getitem__(self, rows: slice, /) -> Self: ...

    def index_select(self, dim: int, index: Tensor) -> Self: ...

    def new_empty(self, *shape: int) -> Tensor: ...


R = TypeVar("R", bound=Rows)

Product = Callable[[R, Tensor | None], Tensor]
"""x [rows, K], bias [N] or None -> [rows, N]: a kernel, or an engine's own layer."""


@dataclass(eq=False)
class PhaseState:
    """The plan of the forward that runs now, shared by all phase-aware layers of a model; None between forwards."""

    plan: Plan | None = None
    _uploaded: tuple[Plan, Tensor] | None = field(default=None, init=False, repr=False)

    def decode_rows(self, device: torch.device) -> Tensor:
        """The plan's decode rows on `device`, int64. The first layer that asks brings them there, the others share."""
        assert self.plan is not None
        if self._uploaded is None or self._uploaded[0] is not self.plan or self._uploaded[1].device != device:
            self._uploaded = self.plan, upload(self.plan.decode_rows, device)
        return self._uploaded[1]


def upload(rows: list[int], device: torch.device) -> Tensor:
    """Indices as int64 on the device; on CUDA from pinned memory, because a copy from any other memory waits for it."""
    indices = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return indices.to(device, non_blocking=True)


def mixed_product(rows: R, bias: Tensor | None, state: PhaseState, prefill: Product[R], decode: Product[R]) -> Tensor:
    """Rows [rows, K] of both phases, as `state` plans them -> [rows, N].

    One product a phase, whatever the order of the rows: each reads its whole weight.
    """
    plan = state.plan
    assert plan is not None
    runs = plan.decode_runs
    where = slice(runs[0].start, runs[0].stop) if len(runs) == 1 else state.decode_rows(rows.device)

    def precise() -> Tensor:
        return decode(rows[where] if isinstance(where, slice) else rows.index_select(0, where), bias)

    def quantized() -> Tensor:
        if 2 * len(plan.decode_rows) <= plan.rows:
            return prefill(rows, bias)  # mostly prompt: a few products in vain cost less than copying the result
        start, stop = plan.span
        spanned = prefill(rows[start:stop], bias)
        out = rows.new_empty(rows.shape[0], spanned.shape[1])
        out[start:stop] = spanned
        return out

    few, out = side_by_side(rows, precise, quantized)
    if isinstance(where, slice):  # a lone prompt's tail, or decode steps beside one prompt, need no index
        out[where] = few
        return out
    return out.index_copy_(0, where, few)


class PhaseLinear(nn.Module):
    """nn.Linear with a kernel for prefill rows and one for decode rows (the same one where both agree).

    Its state dict is that of the nn.Linear it replaces: `weight` and `bias`, nothing quantized.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        prefill: LinearKernel,
        decode: LinearKernel,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: torch.device,
        state: PhaseState,
    ) -> None:
        super().__init__()
        self.name = name
        self.in_features = in_features
        self.out_features = out_features
        self.prefill = prefill
        self.decode = decode
        self.dtype = dtype
        self.device = device
        self.state = state
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], rows in the order of the plan."""
        pending = x.pending if isinstance(x, Deferred) else None
        out = None if pending is None else self._deferred(pending)
        if out is None:
            out = self._dispatch(x.reshape(-1, self.in_features))
        return out.view(*x.shape[:-1], self.out_features)

    def _deferred(self, rows: DeferredRows) -> Tensor | None:
        """The product of rows that are not computed yet; None where they have to be."""
        plan, kernel = self.state.plan, self.prefill
        if not isinstance(kernel, NVFP4ScaledMM) or plan is None or rows.shape[0] != plan.rows:
            return None

        def prefill(rows: DeferredRows, bias: Tensor | None) -> Tensor:
            return kernel.multiply(rows.quantize(kernel.activation_global_scale), bias)

        if plan.only is Phase.PREFILL or kernel is self.decode:
            return prefill(rows, self.bias)
        if 2 * len(plan.decode_rows) > plan.rows:  # codes would be made of a part, and shared by none
            return None
        return mixed_product(rows, self.bias, self.state, prefill, lambda rows, bias: self.decode(rows.compute(), bias))

    def _dispatch(self, rows: Tensor) -> Tensor:
        if self.prefill is self.decode:  # both phases agree: no plan is needed, and torch.compile sees one product
            return self.decode(rows, self.bias)
        plan = self.state.plan
        if plan is None:
            raise InputError(
                f"{self.name} was called outside of the decoder's forward: call the model, which knows where its "
                "prompt ends, or add the layer to `ignore`."
            )
        if plan is DECODE_ONLY:  # asked here, so that a compiled decode step stays one graph: `_planned` breaks it
            return self.decode(rows, self.bias)
        planned: Tensor = self._planned(rows, plan)
        return planned

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _planned(self, rows: Tensor, plan: Plan) -> Tensor:
        if rows.shape[0] != plan.rows:
            raise InputError(
                f"{self.name} got {rows.shape[0]} rows in a batch of {plan.rows}: its rows are not the batch's tokens, "
                "so add it to `ignore`."
            )
        if plan.only is Phase.PREFILL:
            return self.prefill(rows, self.bias)
        if plan.only is Phase.DECODE:
            return self.decode(rows, self.bias)
        return mixed_product(rows, self.bias, self.state, self.prefill, self.decode)

    @property
    def weight(self) -> Tensor:
        """The checkpoint's weight [N, K], to be read; unpacked anew at each access where the kernel keeps it packed.

        Writing to it raises InputError: the quantized copy would keep the old weight, and the prompt with it.
        """
        return self.original.as_subclass(ReadOnly)

    @property
    def original(self) -> Tensor:
        """The checkpoint's weight [N, K] for those who only read it: a plain tensor."""
        if not isinstance(self.decode, PlainKernel):
            raise InputError(
                f"{self.name} decodes in {self.decode.format} and keeps no original weight: load the original model "
                "to save or read it."
            )
        return self.decode.dense()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise InputError(WRITTEN)
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.original
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PhaseLinear:
        """Refuse to move or cast: kernels' layouts belong to one device and dtype."""
        probe = torch.empty(0, dtype=self.dtype, device=self.device)  # what `fn` does shows on a tensor without bytes
        moved = fn(probe)
        if moved.dtype != probe.dtype or moved.device != probe.device:
            raise InputError("A converted model stays on its device and dtype: move or cast it first, then convert.")
        return self

    def extra_repr(self) -> str:
        names = f"prefill={self.prefill.name}, decode={self.decode.name}"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {names}"
