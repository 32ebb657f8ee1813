"""A small model whose NVFP4 products are computed by the book, on any device that has Triton or its interpreter: what
norms and MLPs that defer change in it, and what they must not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import mixquant
from mixquant.kernels import KERNELS, cuda
from mixquant.kernels.base import Accepted, Verdict
from mixquant.model import producers
from mixquant.model.linear import PhaseLinear
from tests.kernels.layouts import decoded

PROMPT = 12


class ByTheBook(cuda.NVFP4ScaledMM):
    """The product in float64, from nothing but its operands."""

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        return Accepted()

    def multiply(self, operands: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        x, weight = decoded(*operands), decoded(self.weight, self.weight_scales)
        return ((x * self.input_decode.double()) @ (weight * self.weight_decode.double()).T).to(self.dtype)


def plain_model(device: torch.device) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(device, torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    return model


def compared(device: torch.device) -> dict[str, Any]:
    """One model that defers against one that does not, and what a fault would look like."""
    plain = plain_model(device)
    deferring = converted(plain)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(producers, "install", lambda model, state: None)
        apart = converted(plain)
    ids = torch.arange(1, 1 + PROMPT, device=device)[None]
    with torch.no_grad():
        (one, read, seen), (other, _, expected) = (recorded(model, ids) for model in (deferring, apart))
        control = plain(ids).logits.float()
    with_grad, all_apart, _ = recorded(deferring, ids)
    return {
        "quantized alone": [read, all_apart],
        "logits": float((one - other).abs().max()),
        "control": float((control - other).abs().max()),
        "first decode rows": max(float((a - b).abs().max()) for a, b in zip(seen[:3], expected[:3], strict=True)),
        "with grad": torch.equal(with_grad, other),
        "steps": [float((a - b).abs().max()) for a, b in zip(*map(steps, (deferring, apart)), strict=True)],
    }


def steps(model: torch.nn.Module) -> list[Tensor]:
    """Logits of four steps of generate after two prompts, one of them padded."""
    ids = torch.arange(2 * PROMPT, device=next(model.parameters()).device).view(2, PROMPT) + 1
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(ids, attention_mask=mask, pad_token_id=0, **how)  # type: ignore[operator]
    return [logits.float() for logits in found.logits]


def converted(plain: Qwen3ForCausalLM) -> torch.nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KERNELS, "nvfp4", (ByTheBook,))  # type: ignore[arg-type]
        return mixquant.convert_(copy.deepcopy(plain), "nvfp4,tail=1")


def recorded(model: torch.nn.Module, ids: Tensor) -> tuple[Tensor, int, list[Tensor]]:
    """Logits; how many inputs were quantized on their own; what the BF16 products were given."""
    alone: list[Tensor] = []
    given: list[Tensor] = []
    decode = type(next(layer for layer in model.modules() if isinstance(layer, PhaseLinear)).decode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_quantize_nvfp4", recording(alone, cuda._quantize_nvfp4, 0))
        patch.setattr(decode, "__call__", recording(given, decode.__call__, 1))
        return model(ids).logits.detach().float(), len(alone), given


def recording(seen: list[Tensor], original: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A function that also keeps one of its arguments."""

    def call(*args: Any) -> Any:
        seen.append(args[at].detach().clone())
        return original(*args)

    return call
