"""The independent reference: two ordinary models, a quantized copy that reads and a plain one that writes.

The quantized copy reads prompt[:-tail] and hands over its KV cache; the plain model goes on. That is a disaggregated
pair, and what one phase-aware model must equal. Of mixquant, only the number formats are used (they are verified bit
for bit elsewhere): no kernel, no plan, no tracker. Sequences are scored alone, without padding, token by token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from mixquant.formats import fp8, int8, nvfp4, scales

EXACT = 1e-8
"""Largest difference of log-probabilities that counts as equal, in float64."""

CONTROL = 1e-2
"""Smallest difference that a control must show."""

NEW_TOKENS = 12

FakeQuant = Callable[[Tensor], Tensor]


def nvfp4_activations(rows: Tensor) -> Tensor:
    return nvfp4.quantize_activation(rows).dequantize().double()


def nvfp4_weight(weight: Tensor) -> Tensor:
    return nvfp4.quantize_weight(weight, scales.search).dequantize().double()


def fp8_rows(rows: Tensor) -> Tensor:
    quantized = fp8.quantize(rows)
    return quantized.codes.double() * quantized.scales.double()


def int8_rows(rows: Tensor) -> Tensor:
    quantized = int8.quantize(rows)
    return quantized.codes.double() * quantized.scales.double()


def int8_per_batch(rows: Tensor) -> Tensor:
    """One scale for all rows of a call: what a row-independent quantizer must not do."""
    scale = rows.abs().amax() / int8.CODE_MAX
    return torch.round(rows / scale) * scale


FORMATS: dict[str, tuple[FakeQuant, FakeQuant]] = {
    "nvfp4": (nvfp4_activations, nvfp4_weight),
    "fp8": (fp8_rows, fp8_rows),
    "int8": (int8_rows, int8_rows),
    "per-batch": (int8_per_batch, int8_rows),
}
"""How each format changes (activations, weight)."""


class FakeQuantLinear(nn.Module):
    """nn.Linear whose weight and input have gone through a format and back, multiplied in float64."""

    def __init__(self, linear: nn.Linear, format: str) -> None:
        super().__init__()
        self.activations, fake_weight = FORMATS[format]
        self.register_buffer("weight", fake_weight(linear.weight.detach()))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = self.activations(x.reshape(-1, x.shape[-1]))
        return nn.functional.linear(rows, self.weight, self.bias).view(*x.shape[:-1], -1)


def quantized_copy(model: nn.Module, format: str = "nvfp4", skip: Sequence[str] = ("lm_head",)) -> nn.Module:
    """A copy of `model` with every nn.Linear but those named in `skip` fake-quantized."""
    quantized = copy.deepcopy(model)
    for name, module in list(quantized.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in skip:
            parent, _, child = name.rpartition(".")
            setattr(quantized.get_submodule(parent), child, FakeQuantLinear(module, format))
    return quantized


@dataclass(frozen=True)
class TwoModels:
    """`reader` takes the prompt but for its tail, `writer` everything after it."""

    reader: PreTrainedModel
    writer: PreTrainedModel

    @classmethod
    def of(cls, plain: PreTrainedModel, format: str = "nvfp4") -> TwoModels:
        return cls(quantized_copy(plain, format), plain)

    @property
    def controls(self) -> tuple[TwoModels, TwoModels]:
        """All quantized and all plain: a phase-aware model must differ from both."""
        return TwoModels(self.reader, self.reader), TwoModels(self.writer, self.writer)

    def score(self, prompt: Tensor, answer: Tensor, tail: int = 1, cache: DynamicCache | None = None) -> Tensor:
        """Log-probs [len(answer), vocabulary] along `answer`; a kept `cache` holds the start of `prompt`."""
        if cache is None:
            return _score_alone(self, tuple(prompt.tolist()), tuple(answer.tolist()), tail)
        return self._score(prompt, answer, tail, cache)

    @torch.no_grad()
    def _score(self, prompt: Tensor, answer: Tensor, tail: int, cache: DynamicCache) -> Tensor:
        seen = cache.get_seq_length()
        split = max(len(prompt) - tail, seen)
        for model, part in ((self.reader, prompt[seen:split]), (self.writer, prompt[split:])):
            if len(part):
                logits = model(part[None], past_key_values=cache).logits
        steps = [logits[0, -1]]
        for token in answer[:-1]:
            steps.append(self.writer(token.view(1, 1), past_key_values=cache).logits[0, -1])
        return torch.stack(steps).log_softmax(-1)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Tensor], rows: int = 1, **options: object) -> Tensor:
        """Tokens [sequences, new] of Transformers' own generate on `writer`, given the cache of `reader`.

        rows: how many rows generate makes of each prompt (beams, returned sequences).
        """
        ids, mask = left_padded(prompts)
        cache = self.new_cache()
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        self.reader(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(rows)
        return generate(self.writer, ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1] :]

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.writer.config)


@functools.cache
def _score_alone(pair: TwoModels, prompt: tuple[int, ...], answer: tuple[int, ...], tail: int) -> Tensor:
    """Computed once: modes of `generate` that must agree ask for the same answers to the same prompts."""
    return pair._score(torch.tensor(prompt), torch.tensor(answer), tail, pair.new_cache())


def left_padded(prompts: Sequence[Tensor], extra: int = 0) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), both [sequences, columns], with `extra` columns of padding more than needed."""
    columns = max(map(len, prompts)) + extra
    ids = torch.stack([nn.functional.pad(prompt, (columns - len(prompt), 0)) for prompt in prompts])
    lengths = torch.tensor([[len(prompt)] for prompt in prompts])
    return ids, (torch.arange(columns) >= columns - lengths).long()


def generate(model: PreTrainedModel, ids: Tensor | None = None, **options: object) -> Tensor:
    """model.generate that never ends early."""
    defaults = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, **defaults | options)


@contextmanager
def recorded_logits(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The logits of each generated token in float64, which generate itself would round to float32.

    Every decoding method, compiled or not, hands the outputs of each step to this one method.
    """
    steps: list[Tensor] = []
    original = model._update_model_kwargs_for_generation

    def record(outputs: object, *args: object, num_new_tokens: int = 1, **kwargs: object) -> object:
        steps.extend(outputs.logits[:, :num_new_tokens].unbind(1))
        return original(outputs, *args, num_new_tokens=num_new_tokens, **kwargs)

    model._update_model_kwargs_for_generation = record
    try:
        yield steps
    finally:
        del model._update_model_kwargs_for_generation


def answer(model: PreTrainedModel, prompts: Sequence[Tensor], **options: object) -> tuple[Tensor, Tensor]:
    """(tokens [sequences, new], log-probs [sequences, new, vocabulary]) of generate on a left-padded batch."""
    ids, mask = left_padded(prompts)
    with recorded_logits(model) as steps:
        sequences = generate(model, ids, attention_mask=mask, **options)
    return sequences[:, ids.shape[1] :], torch.stack(steps, 1).log_softmax(-1)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def assert_equals(
    reference: TwoModels, prompt: Tensor, tokens: Tensor, log_probs: Tensor, tail: int = 1, greedy: bool = True
) -> None:
    """One answer: log-probs (and greedy tokens) are the reference's, and not those of the controls."""
    expected = reference.score(prompt, tokens, tail)
    assert difference(log_probs, expected) < EXACT
    assert not greedy or torch.equal(tokens, expected.argmax(-1))
    for control in reference.controls:
        assert difference(log_probs, control.score(prompt, tokens, tail)) > CONTROL


def assert_answers(
    reference: TwoModels, model: PreTrainedModel, prompts: Sequence[Tensor], tail: int = 1, **options: object
) -> None:
    """Greedy answers to a left-padded batch are those of the reference to each prompt alone."""
    for prompt, tokens, log_probs in zip(prompts, *answer(model, prompts, **options), strict=True):
        assert len(tokens) == NEW_TOKENS
        assert_equals(reference, prompt, tokens, log_probs, tail)
