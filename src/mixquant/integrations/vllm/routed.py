"""A layer's two products, and the choice between them for the rows of a forward.

One object for linear layers and for sets of experts: what is multiplied is a Tensor [rows, K] there, and rows with
their routing here (`model.linear.Rows`). The choice is `StepState.form`'s; this module only computes.
"""

from __future__ import annotations

from typing import Any, Generic

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context

from mixquant.errors import InputError
from mixquant.integrations.vllm.step import Form, StepState
from mixquant.kernels.base import LinearKernel
from mixquant.kernels.streams import side_by_side
from mixquant.model.linear import Product, R, mixed_product
from mixquant.phase import Phase, Plan


class RoutedLinear(Generic[R]):
    """The products of one layer, chosen row by row by the step's plan."""

    def __init__(self, prefill: Product[R], decode: Product[R], out_features: int, state: StepState) -> None:
        self.prefill = prefill
        self.decode = decode
        self.out_features = out_features
        self.state = state

    def __call__(self, x: R, bias: Tensor | None) -> Tensor:
        """x [rows, K] -> [rows, N]. Raises InputError where the step's plan is missing or is not about these rows."""
        if self.prefill is self.decode:
            return self.prefill(x, bias)
        capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        match self.state.form(get_forward_context().cudagraph_runtime_mode, capturing):
            case Form.PLANNED:
                return self._planned(x, bias)
            case Form.DECODE_GRAPH:
                return self.decode(x, bias)
            case Form.MIXED_GRAPH | Form.DUMMY:
                return self.both(x, bias)

    def _planned(self, x: R, bias: Tensor | None) -> Tensor:
        plan = self.state.plan
        assert plan is not None
        if x.shape[0] < plan.rows:
            raise InputError(
                f"A routed layer got {x.shape[0]} rows in a step of {plan.rows}: switch off what splits a batch "
                "(microbatches, fast prefill), or add the layer to `ignore`."
            )
        if plan.only is Phase.PREFILL:
            return self.prefill(x, bias)
        if plan.only is Phase.DECODE:
            return self.decode(x, bias)
        return self._mixed(x, bias, plan)

    def _mixed(self, x: R, bias: Tensor | None, plan: Plan) -> Tensor:
        out = mixed_product(x[: plan.rows], bias, self.state, self.prefill, self.decode)
        padding = x.shape[0] - plan.rows  # of data-parallel ranks in step with each other: never read
        return nn.functional.pad(out, (0, 0, 0, padding)) if padding else out

    def both(self, x: R, bias: Tensor | None) -> Tensor:
        """All rows quantized, and a fixed number of gathered rows precise: what a graph of mixed steps may hold.

        The number is the state's when a graph is recorded, and the graph's from then on. Row 0 of the buffer is the
        dump row: unused places of `gather` compute row 0 of `x` once more, and those of `scatter` drop the result
        there. A graph of fewer rows than places needs no more places than rows.
        """
        places = min(self.state.places, x.shape[0])
        gather, scatter = (buffer[:places] for buffer in self.state.buffers(x.device))
        out = x.new_empty(x.shape[0] + 1, self.out_features)
        few, _ = side_by_side(
            x,
            lambda: self.decode(x.index_select(0, gather), bias),
            lambda: write(self.prefill, out[1:], x, bias),
        )
        out.index_copy_(0, scatter, few)
        return out[1:]


def write(product: Product[R], out: Tensor, x: R, bias: Tensor | None) -> Tensor:
    """out[:] = product(x), without a copy where the kernel can write there."""
    into = getattr(product, "into", None)
    if into is None:
        out.copy_(product(x, bias))
    else:
        into(out, x, bias)
    return out


def refill(kernel: object, fresh: LinearKernel | None) -> None:
    """Copy a kernel's new tensors into the old ones, whose addresses CUDA graphs remember."""
    if fresh is None or not isinstance(kernel, LinearKernel):
        return
    for name, value in vars(fresh).items():
        old = getattr(kernel, name)
        if isinstance(value, nn.Module):
            for parameter, new in zip(old.parameters(), value.parameters(), strict=True):
                parameter.data.copy_(new.data)
        elif isinstance(value, Tensor) and not value.is_mkldnn and old.shape == value.shape:
            old.copy_(value)
        elif isinstance(value, Tensor) and value.is_cuda:  # a list whose length the weights decide: of escapes
            if len(value) > len(old):
                raise InputError(
                    "The new weights have more escapes than graphs have room for: start a new engine, or use "
                    "storage=separate."
                )
            old[: len(value)].copy_(value)
        else:  # oneDNN's packed tensors cannot be written to; they exist on CPUs only, where no graph remembers them
            setattr(kernel, name, value)


def release(device: torch.device) -> None:
    """Give back what a layer that is laid out leaves in torch's cache: its BF16 weight, where nobody multiplies by it.

    vLLM loads models under `max_split_size_mb` of 20: memory as large serves no smaller tensor once it is freed, and
    the planes of the next weight would come on top of it. `benchmarks/allocator.py` replays it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()


def enter(name: str, routed: RoutedLinear[Any]) -> None:
    """Let an op find a layer by its name, where vLLM's own ops find theirs."""
    get_current_vllm_config().compilation_config.static_forward_context[_key(name)] = routed


def look_up(name: str) -> RoutedLinear[Any]:
    """The layer of this name in the model that runs now."""
    routed: RoutedLinear[Any] = get_forward_context().no_compile_layers[_key(name)]
    return routed


def _key(name: str) -> str:
    """Under our prefix, since vLLM keeps the layer itself under the plain name, if it has an op too."""
    return f"mixquant:{name}"
