"""Teacher-forced logits at answer positions, with the answer running as decode.

Prompt and answer go through one forward whose prompt length is declared, so prompt tokens are prefill and answer
tokens decode, as in generation. Without that, a forced answer would count as prompt, and every arm would be measured
as if its decode were quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixquant.tracking import prompt_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TokenIds = list[int]


@torch.inference_mode()
def answer_logits(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    answers: Sequence[TokenIds],
    batch_size: int = 8,
) -> list[Tensor]:
    """Logits that predict each answer token: one [answer length, vocabulary] tensor per example.

    Sequences are padded on the right; causal attention keeps padding out of every earlier position.
    """
    logits: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        logits += _batch_logits(model, prompts[chunk], answers[chunk])
    return logits


def _batch_logits(model: PreTrainedModel, prompts: Sequence[TokenIds], answers: Sequence[TokenIds]) -> list[Tensor]:
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    lengths = [len(prompt) for prompt in prompts]
    with prompt_length(model, lengths):
        out = model(input_ids=ids, use_cache=False).logits
    return [out[i, n - 1 : n - 1 + len(answer)] for i, (n, answer) in enumerate(zip(lengths, answers, strict=True))]
