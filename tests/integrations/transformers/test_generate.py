"""generate on a converted model equals a quantized model that reads and a plain model that writes, in every mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import mixquant
from mixquant.kernels import Rejected
from mixquant.kernels.cpu import Int8OneDNN
from tests.integrations.transformers.reference import (
    CONTROL,
    EXACT,
    TwoModels,
    answer,
    assert_answers,
    difference,
    generate,
    left_padded,
    quantized_copy,
    recorded_logits,
)

Convert = Callable[..., PreTrainedModel]
Prompts = list[Tensor]


GREEDY = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunks of one row": {"prefill_chunk_size": 1},
    "chunks": {"prefill_chunk_size": 7},
    "a chunk that ends at the tail": {"prefill_chunk_size": 23},
    "a chunk as long as the prompt": {"prefill_chunk_size": 24},
    "chunks into a static cache": {"prefill_chunk_size": 7, "cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", GREEDY)
def test_greedy_batch_equals_two_models(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, mode: str
) -> None:
    assert_answers(reference, phase, prompts, **GREEDY[mode])


@pytest.mark.parametrize("mode", ["dynamic cache", "no cache", "chunks", "a chunk that ends at the tail"])
@pytest.mark.parametrize("tail", [0, 5])
def test_tail_is_written_by_the_plain_model(
    reference: TwoModels, converted: Convert, prompts: Prompts, mode: str, tail: int
) -> None:
    model = converted({"prefill": "nvfp4", "tail": tail})
    options = {"prefill_chunk_size": 24 - tail} if "ends at the tail" in mode else GREEDY[mode]
    assert_answers(reference, model, prompts, tail, **options)
    with pytest.raises(AssertionError):
        assert_answers(reference, model, prompts, 1, **options)


@pytest.mark.parametrize(("length", "tail"), [(1, 1), (4, 9)])
def test_prompt_no_longer_than_the_tail_is_all_plain(
    plain: PreTrainedModel, reference: TwoModels, converted: Convert, prompts: Prompts, length: int, tail: int
) -> None:
    prompt = prompts[0][:length]
    tokens, log_probs = answer(converted({"prefill": "nvfp4", "tail": tail}), [prompt])
    assert difference(log_probs[0], TwoModels(plain, plain).score(prompt, tokens[0])) < EXACT
    assert difference(log_probs[0], reference.controls[0].score(prompt, tokens[0])) > CONTROL


def test_one_prompt_token_without_a_tail_is_quantized(
    reference: TwoModels, converted: Convert, prompts: Prompts
) -> None:
    assert_answers(reference, converted({"prefill": "nvfp4", "tail": 0}), [prompts[0][:1]], tail=0)


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "int8"])
@pytest.mark.parametrize("arm", ["phase", "uniform", "decode-only"])
def test_every_arm_and_format_equals_its_two_models(
    monkeypatch: pytest.MonkeyPatch, plain: PreTrainedModel, prompts: Prompts, format: str, arm: str
) -> None:
    # The native INT8 kernel accumulates in float32; the emulation keeps float64.
    monkeypatch.setattr(Int8OneDNN, "check", lambda device, dtype: Rejected("tested in float64"))
    quantized = quantized_copy(plain, format)
    pairs = {
        "phase": TwoModels(quantized, plain),
        "uniform": TwoModels(quantized, quantized),
        "decode-only": TwoModels(plain, quantized),
    }
    model = mixquant.convert_(copy.deepcopy(plain), f"{format},tail=1" if arm == "phase" else f"{arm}-{format},tail=1")
    prompt = prompts[0]
    tokens, log_probs = answer(model, [prompt])
    for name, pair in pairs.items():
        distance = difference(log_probs[0], pair.score(prompt, tokens[0]))
        assert distance < EXACT if name == arm else distance > CONTROL


def test_failed_generate_leaves_nothing_behind(reference: TwoModels, phase: PreTrainedModel, prompts: Prompts) -> None:
    def fail(ids: Tensor, scores: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer(phase, prompts[:1], logits_processor=[fail])
    assert_answers(reference, phase, prompts)


def test_prompt_length_outside_does_not_change_generate(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts
) -> None:
    with mixquant.prompt_length(phase, 3):
        assert_answers(reference, phase, prompts[:1])


def test_continuous_batching_is_refused(phase: PreTrainedModel, prompts: Prompts) -> None:
    with pytest.raises(mixquant.InputError, match="packs sequences into one row"):
        phase.generate_batch([prompts[0].tolist()])


ROWS = {
    "alone": {},
    "more padding": {"extra": 5},
    "chunks of one row": {"prefill_chunk_size": 1},
    "chunks": {"prefill_chunk_size": 5},
}


def largest_change(model: PreTrainedModel, prompts: Prompts, extra: int = 0, **options: Any) -> float:
    """How far log-probs move between a batch and (each sequence alone, with more padding, in chunks)."""
    _, in_batch = answer(model, prompts)
    changes = []
    for row, prompt in enumerate(prompts):
        ids, mask = left_padded([prompt], extra)
        with recorded_logits(model) as steps:
            generate(model, ids, attention_mask=mask, **options)
        changes.append(difference(torch.cat(steps).log_softmax(-1), in_batch[row]))
    return max(changes)


@pytest.mark.parametrize("composition", ROWS)
def test_a_sequence_does_not_depend_on_its_batch(
    plain: PreTrainedModel, phase: PreTrainedModel, prompts: Prompts, composition: str
) -> None:
    assert largest_change(phase, prompts, **ROWS[composition]) < 1e-10
    dependent: nn.Module = quantized_copy(plain, "per-batch")
    assert largest_change(dependent, prompts, **ROWS[composition]) > CONTROL
