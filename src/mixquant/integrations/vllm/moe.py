"""Routed experts: vLLM's plain BF16 set of experts, and a quantized copy of all of them.

As with linear layers, the set stays what vLLM made it until its weights are loaded; then the policy's copy is made from
them, and the BF16 side packs its own. vLLM's router, BF16 in every phase, chooses the experts of each row; one opaque
op, `mixquant::experts`, sends the rows with their choice through one set or the other as `RoutedLinear` says. Routers
and shared experts are ordinary linear layers.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, UnquantizedFusedMoEMethod
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from mixquant.errors import InputError
from mixquant.integrations.vllm.copies import QuantizedCopies
from mixquant.integrations.vllm.moe_kernels import ACTIVATIONS, ExpertByExpert, ExpertSet, RoutedRows, choose_experts
from mixquant.integrations.vllm.routed import RoutedLinear, look_up, release
from mixquant.kernels.layer import nested_kernel

logger = init_logger(f"vllm.{__name__}")


class PhaseMoEMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Creates, loads and applies the routed experts of one layer; vLLM asks for one for each of its sets."""

    def __init__(self, copies: QuantizedCopies, name: str, layer: nn.Module) -> None:
        super().__init__(layer.moe_config)
        check(layer)
        if copies.policy.storage == "nested":
            raise InputError(f'{name}: experts do not nest: use storage=auto, or add "*.experts" to `ignore`.')
        self.copies = copies
        self.name = name
        self.plain = UnquantizedFusedMoEMethod(layer.moe_config)
        if self.plain.is_monolithic:
            raise InputError(
                "vLLM's BF16 experts are fused with their router here: start with --moe-backend triton (on a CPU: "
                'install vLLM 0.30 or newer), or add "*.experts" to `ignore`.'
            )
        self.routed: RoutedLinear[RoutedRows] | None = None

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self.plain.create_weights(layer, *args, **kwargs)
        nbytes = layer.w13_weight.nbytes + layer.w2_weight.nbytes
        self.copies.startup.expect(self.name, nbytes, functools.partial(self._added_bytes, nbytes))
        for format in (self.copies.policy.prefill, self.copies.policy.decode):
            self._copy_bytes(format)  # refuses what cannot run

    def _added_bytes(self, plain: int, format: str) -> int:
        copy = self._copy_bytes(format)
        replaced = copy and self.copies.policy.prefill == self.copies.policy.decode
        return copy - plain if replaced else copy

    def _copy_bytes(self, format: str) -> int:
        quantizer = choose_experts(format, self.moe, self.copies.policy)
        return 0 if quantizer is None else quantizer.nbytes

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantize the loaded experts; then the plain side may pack them. Again after a reload of weights."""
        prefill, decode = self.copies.by_phase(self.name, lambda format: self._quantize(format, layer))
        if self.routed is None:
            self._route(layer, prefill, decode)
        else:
            for old, fresh in ((self.routed.prefill, prefill), (self.routed.decode, decode)):
                if isinstance(old, ExpertSet):
                    old.refill(fresh)
        if prefill is not None and decode is not None:
            for name in ("w13_weight", "w2_weight"):  # nobody multiplies by them
                setattr(layer, name, nn.Parameter(getattr(layer, name).new_empty(0), requires_grad=False))
        else:
            self.plain.process_weights_after_loading(layer)
        del prefill, decode
        release(torch.device(self.moe.device))

    def _quantize(self, format: str, layer: Any) -> ExpertSet | None:
        quantizer = choose_experts(format, self.moe, self.copies.policy)
        return None if quantizer is None else quantizer.quantize(layer.w13_weight.data, layer.w2_weight.data)

    def _route(self, layer: Any, prefill: ExpertSet | None, decode: ExpertSet | None) -> None:
        def plain(rows: RoutedRows, bias: Tensor | None) -> Tensor:
            # None: the runner adds the shared experts and their input itself (see `apply`).
            out: Tensor = self.plain.apply(layer, rows.x, rows.weights, rows.ids, None, None)
            return out

        self.routed = RoutedLinear(prefill or plain, decode or plain, layer.hidden_size, self.copies.state)
        nests = nested_kernel(self.copies.policy, torch.device(self.moe.device), self.moe.in_dtype) is not None
        self.copies.add(self.name, self.routed, "experts do not nest" if nests else None)
        limit_graphs(prefill, decode)

    def apply(
        self,
        layer: nn.Module,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: nn.Module | None,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [rows, H] -> [rows, H]. Shared experts are the runner's to call: vLLM only hands them to kernels of its own
        that overlap them with a dispatch between ranks."""
        out: Tensor = torch.ops.mixquant.experts(x, topk_weights, topk_ids, _encode_layer_name(self.name))
        return out

    def maybe_roundup_sizes(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        sizes: tuple[int, int] = self.plain.maybe_roundup_sizes(*args, **kwargs)
        return sizes

    def get_fused_moe_quant_config(self, layer: nn.Module) -> Any:
        return self.plain.get_fused_moe_quant_config(layer)

    @property
    def topk_indices_dtype(self) -> torch.dtype | None:
        return cast("torch.dtype | None", self.plain.topk_indices_dtype)


def check(layer: Any) -> None:
    """Raise InputError for experts that no quantized copy can follow; `layer` is vLLM's RoutedExperts."""
    moe, config = layer.moe_config, get_current_vllm_config()
    spread = config.parallel_config.enable_expert_parallel or moe.moe_parallel_config.use_ep
    if spread or moe.dp_size > 1 or moe.pcp_size > 1 or moe.is_sequence_parallel:
        raise InputError(
            "Experts follow phases only where each rank computes its own batch's rows: start without expert, data and "
            'context parallelism (tensor and pipeline parallelism work), or add "*.experts" to `ignore`.'
        )
    if moe.is_lora_enabled:
        raise InputError(
            "vLLM's LoRA for experts would bypass the quantized ones: start without --enable-lora, or add "
            '"*.experts" to `ignore`.'
        )
    plain_sum = not moe.has_bias and not layer.apply_router_weight_on_input and layer.swiglu_limit is None
    if moe.activation.value not in ACTIVATIONS or not plain_sum:
        raise InputError(
            f"Experts with biases, weighted inputs, clamps or {moe.activation.value} cannot be quantized: add "
            '"*.experts" to `ignore`.'
        )


def limit_graphs(prefill: ExpertSet | None, decode: ExpertSet | None) -> None:
    """Keep experts that wait for the device out of CUDA graphs: decode steps lose theirs only if they wait too."""
    compilation = get_current_vllm_config().compilation_config
    mode = compilation.cudagraph_mode
    if isinstance(decode, ExpertByExpert):
        limit = CUDAGraphMode.NONE
    elif isinstance(prefill, ExpertByExpert) and mode.has_piecewise_cudagraphs():
        limit = CUDAGraphMode.FULL_DECODE_ONLY if mode.has_full_cudagraphs() else CUDAGraphMode.NONE
    else:
        return
    if mode is not limit:
        logger.warning_once("mixquant: emulated experts limit CUDA graphs to %s.", limit.name)
        compilation.cudagraph_mode = limit


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: LayerNameType) -> Tensor:
    name = _resolve_layer_name(layer_name)
    routed: RoutedLinear[RoutedRows] = look_up(name)
    try:
        return routed(RoutedRows(x, topk_weights, topk_ids), None)  # no bias: `check` refuses experts that have one
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def _experts_fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: LayerNameType) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("mixquant", "FRAGMENT")
direct_register_custom_op("experts", _experts, fake_impl=_experts_fake, target_lib=_library)
