"""Sequences of different lengths on one rectangular KV cache.

Transformers keeps the keys and values of a batch as a rectangle [sequences, columns]. Here each sequence owns some of
its row's columns, in order, and a mask hides the others: the padding after a shorter prompt, and drafted tokens that
were not accepted. A token's position counts its own sequence's tokens, so no sequence sees another's length. Once many
columns hold nothing, they are dropped.

Two ways in: `prefill` reads prompts, `extend` appends forced or drafted tokens, any number of them at once. Lengths
differ from call to call, so cuDNN's attention is off in both (`attention.py`).

Layers with a sliding window would forget columns, and count hidden ones. So they keep all keys and values here as well,
and their masks say what they see: a 4-D mask for each kind of attention, made from positions (`Windows`), which
Transformers' models take as it is. Models with another kind of state (recurrent, chunked) are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from mixquant.errors import InputError
from mixquant.evaluate.engine import TokenIds
from mixquant.integrations.transformers.attention import without_cudnn_attention
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

    @property
    def nbytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

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

    def cut(self, tokens: int) -> Ragged:
        """The same without the last tokens of each sequence."""
        kept = self.mask.cumsum(1) <= self.lengths[:, None] - tokens
        return Ragged(self.cache, self.mask & kept) if tokens > 0 else self

    def keep(self, counts: Sequence[int], width: int) -> Ragged:
        """Of the last `width` columns, keep the first counts[i] of sequence i."""
        kept = torch.tensor(counts, device=self.mask.device)[:, None] > torch.arange(width, device=self.mask.device)
        return Ragged(self.cache, torch.cat([self.mask[:, :-width], self.mask[:, -width:] & kept], 1))


@torch.inference_mode()
@without_cudnn_attention()
def prefill(model: PreTrainedModel, prompts: Sequence[TokenIds], masked: bool = False) -> Ragged:
    """Read prompts as prefill. Padding on the right needs no mask: nothing before it can see it.

    masked: mask it nonetheless, which is the same arithmetic in another attention kernel.
    """
    ids, mask = _rectangle(prompts, model.device)
    windows = Windows.of(model)
    options: dict[str, Any] = {cache_argument(model): DynamicCache()} if windows.sliding else {}
    if masked or windows.sliding:
        options["attention_mask"] = windows.masks(mask, ids.shape[1])
    with prompt_length(model, ids.shape[1] + model.mixquant_policy.tail):
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **options)
    cache = output[cache_argument(model)]
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise _not_all_kept(model)
    return Ragged(cache, mask)


@torch.inference_mode()
@without_cudnn_attention()
def extend(
    model: PreTrainedModel, state: Ragged, tokens: Sequence[TokenIds], prompt: bool = False, last: bool = False
) -> tuple[Tensor, Ragged]:
    """Append tokens to each sequence, as decode or, with `prompt`, as prefill.

    Returns the logits after each of them [sequences, most tokens, vocabulary], with `last` after the last column only,
    and the longer state; the state given stays as it was.
    """
    ids, new = _rectangle(tokens, model.device)
    mask = torch.cat([state.mask, new], 1)
    positions = state.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
    cache = _fork(state.cache)
    windows = Windows.of(model)
    options: dict[str, Any] = {cache_argument(model): cache, "logits_to_keep": 1 if last else 0}
    options["attention_mask"] = windows.masks(mask, ids.shape[1]) if windows.sliding else mask.long()
    with prompt_length(model, mask.shape[1] + model.mixquant_policy.tail if prompt else 0):
        logits = model(input_ids=ids, position_ids=positions, use_cache=True, **options).logits
    return logits, Ragged(cache, mask)


@dataclass(frozen=True)
class Windows:
    """What the layers of a model see: how many kinds of attention it has, and the sliding window of one of them."""

    kinds: tuple[str, ...]
    window: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Windows:
        """InputError for a model that keeps anything but keys and values."""
        config = model.config.get_text_config()
        kinds = tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))
        if not set(kinds) <= {FULL, SLIDING}:
            raise _not_all_kept(model)
        window = getattr(config, "sliding_window", None)
        return cls(kinds or (SLIDING if window else FULL,), window)

    @property
    def sliding(self) -> bool:
        return SLIDING in self.kinds

    def masks(self, owned: Tensor, queries: int) -> Any:
        """What the last `queries` columns see of all columns: bool [sequences, 1, queries, columns], or one a kind.

        owned: bool [sequences, columns]. A column sees its own sequence's columns up to itself; with a sliding window
        the last `window` of them. One that belongs to nobody sees itself, so that no row of scores is empty.
        """
        position = owned.cumsum(1)
        column = torch.arange(owned.shape[1], device=owned.device)
        row, asks = column[-queries:, None], position[:, -queries:, None]
        full = owned[:, None] & (column <= row) | (column == row)
        near = full & (asks - position[:, None] < self.window) if self.window else full
        made = {FULL: full[:, None], SLIDING: near[:, None]}
        return {kind: made[kind] for kind in self.kinds} if len(self.kinds) > 1 else made[self.kinds[0]]


FULL, SLIDING = "full_attention", "sliding_attention"


def _not_all_kept(model: PreTrainedModel) -> InputError:
    return InputError(
        f"{type(model).__name__} keeps something else than keys and values (a recurrent or chunked state): evaluate it "
        "with --engine vllm."
    )


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
