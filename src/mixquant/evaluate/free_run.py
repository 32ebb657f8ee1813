"""Greedy answers to many prompts, in left-padded batches fixed by their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TokenIds = list[int]


@torch.inference_mode()
def answer_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    longest: Sequence[int],
    batch_size: int = 16,
) -> list[str]:
    """The text that the model writes after each prompt, up to its end-of-turn token.

    longest: new tokens after which each answer is cut off; a batch runs to its own longest.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        texts += _batch_texts(model, tokenizer, prompts[chunk], max(longest[chunk]))
    return texts


def _batch_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[TokenIds],
    max_new_tokens: int,
) -> list[str]:
    width = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    return list(tokenizer.batch_decode(out[:, width:], skip_special_tokens=True))
