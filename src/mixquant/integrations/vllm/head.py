"""The output head where weights nest: the same BF16 numbers from 12 bits a weight.

The head is read whole at every step, and never quantized: nesting loses nothing. vLLM multiplies by it outside of what
torch.compile sees, for the rows that choose a token, all of which are decode. A head that shares its weight with the
embedding stays as it is, for the embedding is looked up row by row.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from mixquant.devices import size_text
from mixquant.errors import InputError
from mixquant.integrations.vllm.announce import logger
from mixquant.integrations.vllm.routed import refill, release
from mixquant.kernels.layer import nested_kernel
from mixquant.kernels.nested import Layout, NestedKernel
from mixquant.policy import Policy


def head_method(policy: Policy, config: VllmConfig) -> NestedHeadMethod | None:
    """The method of an output head; None for vLLM's own."""
    model = config.model_config
    tied = getattr(model.hf_text_config, "tie_word_embeddings", False)
    other = getattr(model, "head_dtype", model.dtype) != model.dtype  # vLLM casts the weight itself
    if tied or other or policy.prefill == "bf16":
        return None
    kernel = nested_kernel(policy, torch.device(config.device_config.device_type), model.dtype)
    return None if kernel is None else NestedHeadMethod(kernel)


class NestedHeadMethod(UnquantizedEmbeddingMethod):  # type: ignore[misc]
    """vLLM's own method, but for what multiplies."""

    def __init__(self, kind: type[NestedKernel]) -> None:
        self.kind = kind
        self.kernel: NestedKernel | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nest the loaded weight, if it can be; again after a reload of weights."""
        weight: Tensor = layer.weight.data  # type: ignore[assignment]
        found = self._nest(weight)
        if isinstance(found, str):
            if self.kernel is not None:
                raise InputError(f"lm_head: {found}: start a new engine, or use storage=separate.")
            super().process_weights_after_loading(layer)
        else:
            fresh = self.kind(found)
            if self.kernel is None:
                self.kernel = fresh
            else:
                refill(self.kernel, fresh)
            layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # nobody multiplies by it
            saved = weight.nbytes - sum(tensor.nbytes for tensor in fresh.tensors())
            found = f"nested too, which saves {size_text(max(0, saved))}"
            device = weight.device
            del weight, fresh
            release(device)
        if get_tensor_model_parallel_rank() == 0:
            logger.info("mixquant storage: output head %s", found)

    def _nest(self, weight: Tensor) -> Layout | str:
        """The nested weight, or why it stays as it is."""
        try:
            nested = self.kind.unsupported(*weight.shape) or self.kind.nest(weight)
        except InputError as error:
            raise InputError(f"lm_head: {error}") from None
        return f"in BF16: {nested}" if isinstance(nested, str) else nested

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N]"""
        if self.kernel is None:
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        rows = x.reshape(-1, x.shape[-1])
        return self.kernel(rows, bias).view(*x.shape[:-1], -1)
