"""Teacher forcing must run the answer as decode, token by token the same as writing it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from mixquant.evaluate.divergence import answer_logits
from mixquant.evaluate.free_run import answer_texts
from mixquant.models import load_tokenizer

PROMPTS = [[5, 9, 3, 7, 7, 2, 11], [8, 1, 4, 4]]
ANSWERS = [[6, 2, 9], [3, 10, 12, 5, 1]]


@torch.inference_mode()
def stepwise(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits of a hand-written loop that writes the forced answer one token at a time."""
    out = model(torch.tensor([prompt]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in answer[:-1]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


def test_forced_logits_equal_writing_the_answer(phase: PreTrainedModel) -> None:
    for prompt, answer, logits in zip(PROMPTS, ANSWERS, answer_logits(phase, PROMPTS, ANSWERS), strict=True):
        assert (logits - stepwise(phase, prompt, answer)).abs().max() < 1e-8


def test_uniform_and_plain_differ(
    plain: PreTrainedModel, phase: PreTrainedModel, converted: Callable[..., PreTrainedModel]
) -> None:
    ours = answer_logits(phase, PROMPTS, ANSWERS)
    for other in (converted("uniform-nvfp4"), converted("bf16")):
        theirs = answer_logits(other, PROMPTS, ANSWERS)
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(ours, theirs, strict=True))


def test_batches_do_not_change_a_sequence(phase: PreTrainedModel) -> None:
    together = answer_logits(phase, PROMPTS, ANSWERS)
    alone = answer_logits(phase, PROMPTS, ANSWERS, batch_size=1)
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(together, alone, strict=True))


def test_free_run_pads_on_the_left(phase: PreTrainedModel) -> None:
    tokenizer = load_tokenizer("demo")
    alone = [text for prompt in PROMPTS for text in answer_texts(phase, tokenizer, [prompt], [6])]
    assert answer_texts(phase, tokenizer, PROMPTS, [6, 6]) == alone
