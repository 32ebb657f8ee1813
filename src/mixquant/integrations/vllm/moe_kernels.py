"""The quantized copies of a set of experts: both matrices of each, and their product for routed rows.

    FusedFP8         vLLM's own grouped kernels on CUDA, CUTLASS or Triton as it chooses: per output channel, per token
    ExpertByExpert   `mixquant.kernels` one expert at a time: INT8 on the CPU, exact emulation of any format anywhere

Grouped NVFP4 kernels are not used yet: NVFP4 experts are emulated on Blackwell too, and a policy with `native: true`
refuses them. Emulation reads on the host which expert gets which rows, so no CUDA graph can hold it.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from mixquant import kernels
from mixquant.errors import InputError
from mixquant.formats import fp8, quantizer
from mixquant.integrations.vllm.parallel import expert_amax
from mixquant.integrations.vllm.routed import refill
from mixquant.kernels import KERNELS, Table
from mixquant.kernels.base import LinearKernel, QuantizedKernel, Rejected
from mixquant.kernels.cpu import Int8OneDNN
from mixquant.kernels.emulation import EmulatedFP8, EmulatedInt8, EmulatedNVFP4
from mixquant.policy import Policy

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
"""Gated activations, by vLLM's names."""

ONE_BY_ONE: Table = {
    "nvfp4": (EmulatedNVFP4,),
    "fp8": (EmulatedFP8,),
    "int8": (Int8OneDNN, EmulatedInt8),
    "bf16": KERNELS["bf16"],
}
"""Kernels that may multiply one expert at a time, in order of preference: on CUDA only emulation may be that slow."""

Kernels = tuple[type[LinearKernel], type[LinearKernel]]
"""Of an expert's two matrices: gate and up, and down."""


@dataclass(frozen=True)
class RoutedRows:
    """Rows of a batch and the experts each goes to: x [rows, H]; weights and ids [rows, experts per token].

    The `Rows` of a RoutedLinear: slices and selections are of all three, so what chooses among rows of `x` needs no
    second form for experts.
    """

    x: Tensor
    weights: Tensor
    ids: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    def __getitem__(self, rows: slice, /) -> RoutedRows:
        return RoutedRows(self.x[rows], self.weights[rows], self.ids[rows])

    def index_select(self, dim: int, index: Tensor) -> RoutedRows:
        return RoutedRows(*(tensor.index_select(dim, index) for tensor in (self.x, self.weights, self.ids)))

    def new_empty(self, *shape: int) -> Tensor:
        return self.x.new_empty(*shape)


class ExpertSet(ABC):
    """The quantized experts of one layer: sums each row's experts, weighted as the router says."""

    name: str
    format: str
    emulated: bool

    @abstractmethod
    def __call__(self, rows: RoutedRows, bias: Tensor | None = None) -> Tensor:
        """-> [rows, H] in the model's dtype. `bias` is always None: it makes the set a `Product`."""

    @abstractmethod
    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the experts' layout holds."""

    @abstractmethod
    def refill(self, fresh: Any) -> None:
        """Take over the weights of `fresh`, keeping the addresses that CUDA graphs remember."""


@dataclass(frozen=True)
class ExpertQuantizer:
    """How the experts of a layer are quantized, and how many bytes the result takes.

    quantize: gate and up of each expert [experts, 2I, H], down [experts, H, I] -> quantized experts.
    """

    quantize: Callable[[Tensor, Tensor], ExpertSet]
    nbytes: int


def choose_experts(format: str, moe: Any, policy: Policy) -> ExpertQuantizer | None:
    """The quantizer for a layer of vLLM's FusedMoEConfig `moe`; None: its experts stay BF16.

    `auto` takes FusedFP8 on CUDA, and INT8 on the CPU where it pays. Raises InputError if no kernel is allowed, or
    able, to run.
    """
    inner, hidden = moe.intermediate_size_per_partition, moe.hidden_dim
    shapes = ((2 * inner, hidden), (hidden, inner))
    fused = fp8_backend(moe) if format in ("auto", "fp8") else Rejected("not for this format")
    if not isinstance(fused, Rejected):
        nbytes = sum(n * (k + 4) for n, k in shapes)  # a byte for each weight, a float32 scale for each row
        return ExpertQuantizer(functools.partial(FusedFP8, moe, *fused), nbytes * moe.num_experts)
    try:
        chosen = _choose_one_by_one(format, shapes, moe, policy)
    except InputError as error:
        raise InputError(f"Experts (vLLM's fused FP8 kernels: {fused.reason}): {error}") from None
    if any(kernel.format == "bf16" for kernel in chosen):
        return None
    nbytes = sum(kernel.nbytes(*shape, moe.in_dtype) for kernel, shape in zip(chosen, shapes, strict=True))
    quantize = functools.partial(ExpertByExpert.from_weights, chosen, moe.activation, policy.scales)
    return ExpertQuantizer(quantize, nbytes * moe.num_experts)


def _choose_one_by_one(format: str, shapes: Iterable[tuple[int, int]], moe: Any, policy: Policy) -> Kernels:
    chosen = []
    for shape in shapes:
        kernel = kernels.choose(format, shape, torch.device(moe.device), moe.in_dtype, policy, ONE_BY_ONE)
        if reason := kernel.unsupported(*shape):
            raise InputError(f'{list(shape)}: {reason}: add "*.experts" to `ignore`.')
        chosen.append(kernel)
    up, down = chosen
    return up, down


class ExpertByExpert(ExpertSet):
    """One expert after another by its two kernels, over the rows that chose it; the sum is taken in float32."""

    def __init__(self, experts: Sequence[tuple[LinearKernel, LinearKernel]], activation: MoEActivation) -> None:
        self.experts = experts
        self.activation = activation
        first, _ = experts[0]
        self.name, self.format, self.emulated = first.name, first.format, first.emulated

    @classmethod
    def from_weights(
        cls, kernels: Kernels, activation: MoEActivation, scales: str, w13: Tensor, w2: Tensor
    ) -> ExpertByExpert:
        """Gate and up of an expert are one matrix, so they share a global scale."""

        def quantized(kernel: type[LinearKernel], weight: Tensor) -> list[LinearKernel]:
            assert issubclass(kernel, QuantizedKernel)
            amax = expert_amax(weight)
            amaxes = [None] * len(weight) if amax is None else amax.unbind()
            return [
                kernel.from_weight(one, quantizer(kernel.format, scales, amax))
                for one, amax in zip(weight, amaxes, strict=True)
            ]

        up, down = map(quantized, kernels, (w13, w2))
        return cls(list(zip(up, down, strict=True)), activation)

    def __call__(self, rows: RoutedRows, bias: Tensor | None = None) -> Tensor:
        # Sorted by expert, each has one span of places; stable, so that its rows keep their order, and their rounding.
        ids, places = rows.ids.flatten().sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(len(self.experts) + 1, device=ids.device, dtype=ids.dtype))
        spans = itertools.pairwise(bounds.tolist())  # the one wait for the device
        out = torch.zeros_like(rows.x, dtype=torch.float32)
        for expert, (start, stop) in zip(self.experts, spans, strict=True):
            if start < stop:
                place = places[start:stop]
                row = place // rows.ids.shape[1]  # a place is a row and a choice, flattened
                out.index_add_(0, row, self._one(*expert, rows.x[row]) * rows.weights.flatten()[place, None])
        return out.to(rows.x.dtype)

    def _one(self, up: LinearKernel, down: LinearKernel, x: Tensor) -> Tensor:
        gate_and_up = up(x, None)
        hidden = x.new_empty(x.shape[0], gate_and_up.shape[1] // 2)
        apply_moe_activation(self.activation, hidden, gate_and_up)
        return down(hidden, None)

    def tensors(self) -> Iterator[Tensor]:
        return (tensor for expert in self.experts for kernel in expert for tensor in kernel.tensors())

    def refill(self, fresh: ExpertByExpert) -> None:
        for old, new in zip(self.experts, fresh.experts, strict=True):
            for kernel, source in zip(old, new, strict=True):
                refill(kernel, source)


def fp8_backend(moe: Any) -> tuple[Any, Any] | Rejected:
    """vLLM's FP8 backend and expert class for a layer's FusedMoEConfig: the ones its uniform FP8 would take.

    Weight-only kernels are Rejected, and those that want other scales than ours.
    """
    from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend, select_fp8_moe_backend
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticChannelSym

    if torch.device(moe.device).type != "cuda":
        return Rejected("run on CUDA")
    if moe.hidden_dim % 16 or moe.intermediate_size_per_partition % 16:
        return Rejected("need multiples of 16")
    keys = {"weight_key": kFp8StaticChannelSym, "activation_key": kFp8DynamicTokenSym}
    try:
        # By default vLLM leaves its CUTLASS experts out; for checkpoints of per-channel FP8 it allows them, as we do.
        backend, experts = select_fp8_moe_backend(moe, **keys, allow_vllm_cutlass=True)
    except (ValueError, NotImplementedError) as error:
        return Rejected(str(error))
    if backend not in (Fp8MoeBackend.VLLM_CUTLASS, Fp8MoeBackend.TRITON):
        return Rejected(f"vLLM would take {backend.value}, which is not per-channel W8A8")
    return backend, experts


class FusedFP8(ExpertSet):
    """FP8 W8A8 by vLLM's fused experts; all shapes are known to the host, so CUDA graphs can hold it."""

    format = "fp8"
    emulated = False

    def __init__(self, moe: Any, backend: Any, experts: Any, w13: Tensor, w2: Tensor) -> None:
        from vllm.model_executor.layers.fused_moe.oracle.fp8 import make_fp8_moe_kernel, make_fp8_moe_quant_config

        self.name = f"vllm.{experts.__name__}"
        self.moe = moe
        self.w13, self.w13_scales = _quantized(w13)
        self.w2, self.w2_scales = _quantized(w2)
        config = make_fp8_moe_quant_config(
            backend,
            self.w13_scales,
            self.w2_scales,
            None,  # no static scales, neither of x
            None,  # nor of what goes into the second matrix: each token's is taken from its own row
            per_act_token_quant=True,
            per_out_ch_quant=True,  # says how to read scales of [experts, N, 1]; by itself vLLM reads one an expert
        )
        self.kernel = make_fp8_moe_kernel(config, moe, experts, backend)

    def __call__(self, rows: RoutedRows, bias: Tensor | None = None) -> Tensor:
        out: Tensor = self.kernel.apply(
            rows.x,
            self.w13,
            self.w2,
            rows.weights,
            rows.ids,
            activation=self.moe.activation,
            global_num_experts=self.moe.num_experts,
            expert_map=None,  # every rank has all experts, or a shard of each: expert parallelism is refused
            apply_router_weight_on_input=False,  # the router's weights scale the outputs; inputs are refused too
        )
        return out

    def tensors(self) -> Iterator[Tensor]:
        return iter((self.w13, self.w13_scales, self.w2, self.w2_scales))

    def refill(self, fresh: FusedFP8) -> None:
        for old, new in zip(self.tensors(), fresh.tensors(), strict=True):
            old.copy_(new)


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[experts, N, K] -> E4M3 codes of the same shape, float32 scales [experts, N, 1]."""
    parts = [fp8.quantize(expert.detach()) for expert in weight]
    return torch.stack([part.codes for part in parts]), torch.stack([part.scales for part in parts])
