"""Sequences of different lengths on one rectangular KV cache.

Transformers keeps the keys and values of a batch as a rectangle [sequences, columns]. Here each sequence owns some of
its row's columns, in order, and a mask hides the others: the padding after a shorter prompt, and drafted tokens that
were not accepted. A token's position counts its own sequence's tokens, so no sequence sees another's length. Once many
columns hold nothing, they are dropped.

Two ways in, one for each phase (`mixquant.phase`): `prefill` reads prompts, `extend` appends forced or drafted tokens
as decode, any number of them at once. Models whose layers keep anything but all keys and values (sliding windows,
recurrent states) are refused: there a hidden column would not be without effect.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mixquant.errors import InputError
from mixquant.evaluate.engine import TokenIds
from mixquant.model.tracking import cache_argument, prompt_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel


SPARE_COLUMNS = 64
"""Columns without a token that may pile up before they are dropped."""


@dataclass(frozen=True)
class Ragged:
    """cache: keys and values. mask: bool [sequences, columns], which columns a sequence owns."""

    cache: Any
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence: int64 [sequences]."""
        return self.mask.sum(-1)

    def select(self, rows: Sequence[int]) -> Ragged:
        """Some of the sequences."""
        index = torch.tensor(rows, device=self.mask.device)
        cache = _fork(self.cache)
        cache.batch_select_indices(index)
        return Ragged(cache, self.mask[index])

    def compact(self) -> Ragged:
        """The same without the columns that hold nothing, if there are many: each sequence's own come first."""
        longest = int(self.lengths.max())
        if self.mask.shape[1] <= longest + SPARE_COLUMNS:
            return self
        owned = (~self.mask).int().argsort(dim=1, stable=True)[:, :longest]
        cache = _fork(self.cache)
        for layer in cache.layers:
            index = owned[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        return Ragged(cache, self.mask.gather(1, owned))

    def keep(self, counts: Sequence[int], width: int) -> Ragged:
        """Of the last `width` columns, keep the first counts[i] of sequence i."""
        kept = torch.tensor(counts, device=self.mask.device)[:, None] > torch.arange(width, device=self.mask.device)
        return Ragged(self.cache, torch.cat([self.mask[:, :-width], self.mask[:, -width:] & kept], 1))


@torch.inference_mode()
def prefill(model: PreTrainedModel, prompts: Sequence[TokenIds]) -> Ragged:
    """Read prompts as prefill. Padding on the right needs no mask: nothing before it can see it."""
    ids, mask = _rectangle(prompts, model.device)
    with prompt_length(model, ids.shape[1] + model.mixquant_policy.tail):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = output[cache_argument(model)]
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise InputError(
            f"{type(model).__name__} keeps something else than all keys and values (a sliding window, a recurrent "
            "state): evaluate it with --engine vllm."
        )
    return Ragged(cache, mask)


@torch.inference_mode()
def extend(model: PreTrainedModel, state: Ragged, tokens: Sequence[TokenIds]) -> tuple[Tensor, Ragged]:
    """Append tokens to each sequence as decode; at least one for each.

    Returns the logits after each of them [sequences, most tokens, vocabulary] and the longer state; the state given
    stays as it was.
    """
    ids, new = _rectangle(tokens, model.device)
    mask = torch.cat([state.mask, new], 1)
    positions = state.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
    cache = _fork(state.cache)
    past = {cache_argument(model): cache}
    with prompt_length(model, 0):
        logits = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=True, **past).logits
    return logits, Ragged(cache, mask)


def _rectangle(rows: Sequence[TokenIds], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids padded on the right, and the mask of what is no padding: [rows, longest] each."""
    width = max(1, *map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) < lengths[:, None]


def _fork(cache: Any) -> Any:
    """A cache that grows apart from the given one. Layers replace their tensors when they grow, so none is copied."""
    fork = copy.copy(cache)
    fork.layers = [copy.copy(layer) for layer in cache.layers]
    return fork
