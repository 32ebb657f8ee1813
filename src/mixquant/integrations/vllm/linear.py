"""The routed linear layer: vLLM's plain BF16 layer, and a quantized twin of its weight.

The layer stays what vLLM made it: its weight is loaded, fused, sharded, tied and adapted (LoRA) as ever. Once it is
loaded, and before the BF16 side packs it, the policy's kernel is made from it. One opaque op, `mixquant::linear`, takes
the place of the product: torch.compile sees a call, and which rows are which is read at run time.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from mixquant.errors import InputError
from mixquant.integrations.vllm.step import StepState
from mixquant.kernels.base import LinearKernel
from mixquant.model.linear import Product, mixed_product
from mixquant.phase import Phase, Plan

if TYPE_CHECKING:
    from mixquant.integrations.vllm.config import PhaseConfig


class RoutedLinear:
    """The products of one layer, chosen row by row by the step's plan."""

    def __init__(self, prefill: Product, decode: Product, out_features: int, state: StepState) -> None:
        self.prefill = prefill
        self.decode = decode
        self.out_features = out_features
        self.state = state

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [rows, K] -> [rows, N]."""
        if self.prefill is self.decode:
            return self.prefill(x, bias)
        plan = self.state.plan
        if plan is not None and not replayed():
            return self._planned(x, bias, plan)
        if self.state.live and not replayed():
            raise InputError("A routed layer ran in a step without a plan: report this vLLM version to mixquant.")
        return self.decode(x, bias) if captures_decode(x) else self._captured(x, bias)

    def _planned(self, x: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        if x.shape[0] < plan.rows:
            raise InputError(
                f"A routed layer got {x.shape[0]} rows in a step of {plan.rows}: switch off what splits a batch "
                "(microbatches, fast prefill), or add the layer to `ignore`."
            )
        if plan.only is Phase.PREFILL:
            return self.prefill(x, bias)
        if plan.only is Phase.DECODE:
            return self.decode(x, bias)
        assert self.state.decode_rows is not None
        out = mixed_product(x[: plan.rows], bias, plan, self.state.decode_rows, self.prefill, self.decode)
        padding = x.shape[0] - plan.rows  # of data-parallel ranks in step with each other: never read
        return nn.functional.pad(out, (0, 0, 0, padding)) if padding else out

    def _captured(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The form that a graph may hold: all rows quantized, a fixed number of gathered rows precise.

        Row 0 of the buffer is the dump row, where unused places of `scatter` point.
        """
        gather, scatter = (buffer[: x.shape[0]] for buffer in self.state.buffers(x.device))
        out = x.new_empty(x.shape[0] + 1, self.out_features)
        write(self.prefill, out[1:], x, bias)
        out.index_copy_(0, scatter, self.decode(x.index_select(0, gather), bias))
        return out[1:]


def write(product: Product, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """out[:] = product(x), without a copy where the kernel can write there."""
    into = getattr(product, "into", None)
    if into is None:
        out.copy_(product(x, bias))
    else:
        into(out, x, bias)


def replayed() -> bool:
    """Whether this forward is recorded into a piecewise graph, which later steps replay under other plans."""
    return bool(get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE)


def captures_decode(x: Tensor) -> bool:
    """Whether this forward is recorded into a full graph: those are replayed for decode steps only."""
    if get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL:
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing() and not replayed()


@register_weight_loader_v2_supported_method
class PhaseLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Creates, loads and applies one routed layer; vLLM asks for one for each of its linear layers."""

    def __init__(self, config: PhaseConfig, name: str) -> None:
        self.config = config
        self.name = name
        self.plain = UnquantizedLinearMethod()
        self.out_features = 0
        self.routed: RoutedLinear | None = None

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.plain.create_weights(layer, *args, **kwargs)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.out_features = weight.shape[0]
        self.config.expect_layer(self.name, weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantize the loaded weight; then the plain side may pack it. Again after a reload of weights."""
        self.config.startup.check_room()
        policy, plain = self.config.policy, functools.partial(self.plain.apply, layer)
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        kernels: dict[str, LinearKernel | None] = {}
        for format in (policy.prefill, policy.decode):
            if format not in kernels:
                kernels[format] = self.config.make_kernel(format, self.name, layer)
        prefill, decode = kernels[policy.prefill], kernels[policy.decode]
        if self.routed is None:
            self.routed = RoutedLinear(prefill or plain, decode or plain, self.out_features, self.config.state)
            self.config.add_layer(self.name, self.routed)
        else:
            refill(self.routed.prefill, prefill)
            refill(self.routed.decode, decode)
        self.plain.process_weights_after_loading(layer)
        if prefill is not None and decode is not None:
            layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # nobody multiplies by it

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = torch.ops.mixquant.linear(x, bias, _encode_layer_name(self.name), self.out_features)
        return out


def refill(kernel: Product, fresh: LinearKernel | None) -> None:
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
        else:
            setattr(kernel, name, value)


def _linear(x: Tensor, bias: Tensor | None, layer_name: LayerNameType, out_features: int) -> Tensor:
    name = _resolve_layer_name(layer_name)
    routed: RoutedLinear = get_forward_context().no_compile_layers[op_key(name)]
    rows = x.reshape(-1, x.shape[-1])
    try:
        return routed(rows, bias).view(*x.shape[:-1], out_features)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _linear_fake(x: Tensor, bias: Tensor | None, layer_name: LayerNameType, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def op_key(name: str) -> str:
    """Where a routed layer stands among vLLM's layers that ops look up by name."""
    return f"mixquant:{name}"


_library = torch.library.Library("mixquant", "FRAGMENT")
direct_register_custom_op("linear", _linear, fake_impl=_linear_fake, target_lib=_library)
