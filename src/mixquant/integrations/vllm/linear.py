"""The routed linear layer: vLLM's plain BF16 layer, and a quantized copy of its weight.

The layer stays what vLLM made it: its weight is loaded, fused, sharded, tied and adapted (LoRA) as ever. Once it is
loaded, and before the BF16 side packs it, the policy's kernels are made from it. Where both phases have one, as with
nested weights, the layer's own weight is given up. One opaque op, `mixquant::linear`, takes
the place of the product: torch.compile sees a call, and which rows are which is read at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from mixquant.errors import InputError
from mixquant.integrations.vllm.copies import QuantizedCopies
from mixquant.integrations.vllm.routed import RoutedLinear, look_up, refill, release
from mixquant.kernels.base import LinearKernel
from mixquant.kernels.nested import NestedKernel


@register_weight_loader_v2_supported_method  # vLLM asks by class name whether its newer loaders know a method
class PhaseLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Creates, loads and applies one routed layer; vLLM asks for one for each of its linear layers.

    parts: the checkpoint's names of the layers that vLLM has fused into this one.
    """

    def __init__(self, copies: QuantizedCopies, name: str, parts: Sequence[str]) -> None:
        self.copies = copies
        self.name = name
        self.parts = parts
        self.plain = UnquantizedLinearMethod()
        self.out_features = 0
        self.routed: RoutedLinear[Tensor] | None = None

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.plain.create_weights(layer, *args, **kwargs)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        self.out_features = weight.shape[0]
        self.copies.expect(self.name, weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantize the loaded weight; then the plain side may pack it. Again after a reload of weights."""
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        prefill, decode, separate = self.copies.linear(self.name, self.parts, layer)
        if self.routed is None:
            plain = functools.partial(self.plain.apply, layer)
            self.routed = RoutedLinear(prefill or plain, decode or plain, self.out_features, self.copies.state)
            self.copies.add(self.name, self.routed, separate)
        else:
            self._refill(self.routed, prefill, decode)
        if hasattr(layer, "_use_min_latency_gemm"):  # of DeepSeek V3: multiplies by the layer's weight, past `apply`
            layer._use_min_latency_gemm = False  # type: ignore[assignment]
        if prefill is not None and decode is not None:
            layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # nobody multiplies by it
        else:
            self.plain.process_weights_after_loading(layer)
        device = weight.device
        del weight, prefill, decode
        release(device)

    def _refill(self, routed: RoutedLinear[Tensor], prefill: LinearKernel | None, decode: LinearKernel | None) -> None:
        """Take over new weights, at the addresses of the old ones."""
        if isinstance(routed.decode, NestedKernel) is not isinstance(decode, NestedKernel):
            raise InputError(
                f"{self.name}: of the old and the new weight one nests and one does not: start a new engine, or use "
                "storage=separate."
            )
        refill(routed.prefill, prefill)
        refill(routed.decode, decode)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]"""
        # The number of columns goes along, since torch.compile asks for the result's shape without running the op.
        out: Tensor = torch.ops.mixquant.linear(x, bias, _encode_layer_name(self.name), self.out_features)
        return out


def _linear(x: Tensor, bias: Tensor | None, layer_name: LayerNameType, out_features: int) -> Tensor:
    name = _resolve_layer_name(layer_name)
    routed: RoutedLinear[Tensor] = look_up(name)
    rows = x.reshape(-1, x.shape[-1])
    try:
        return routed(rows, bias).view(*x.shape[:-1], out_features)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _linear_fake(x: Tensor, bias: Tensor | None, layer_name: LayerNameType, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_library = torch.library.Library("mixquant", "FRAGMENT")
direct_register_custom_op("linear", _linear, fake_impl=_linear_fake, target_lib=_library)
