"""The tail that nobody gives: 32 tokens, here on prompts that are longer than it and on prompts that are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import mixquant
from mixquant import kernels
from mixquant.kernels.base import PlainKernel
from mixquant.model.explain import phase_linears
from mixquant.phase import Phase, Run
from mixquant.policy import TAIL
from tests.conftest import VOCABULARY, tiny_qwen3
from tests.integrations.transformers.reference import TwoModels, assert_answers, generate, recorded_logits

Convert = Callable[..., PreTrainedModel]


def prompt(length: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))


def planned(model: PreTrainedModel, ids: Tensor) -> list[tuple[Run, ...]]:
    """The runs of each forward of a greedy answer of three tokens."""
    seen: list[tuple[Run, ...]] = []
    layer = next(phase_linears(model))
    with layer.register_forward_pre_hook(lambda layer, _: seen.append(layer.state.plan.runs)):
        generate(model, ids[None], max_new_tokens=3)
    return seen


def test_the_last_32_tokens_of_a_prompt_are_precise(converted: Convert) -> None:
    default, pairs = converted("nvfp4"), converted("nvfp4,tail=1")
    read, *written = planned(default, prompt(100))
    assert read == (Run(0, 68, Phase.PREFILL), Run(68, 100, Phase.DECODE))
    assert written == [()] * 2  # DECODE_ONLY, which names no rows
    assert planned(pairs, prompt(100))[0] == (Run(0, 99, Phase.PREFILL), Run(99, 100, Phase.DECODE))


def test_answers_are_those_of_two_models_that_hand_over_there(reference: TwoModels, converted: Convert) -> None:
    prompts = [prompt(100), prompt(61)]
    assert_answers(reference, converted("nvfp4"), prompts, TAIL)
    for other in (TAIL - 1, TAIL + 1):
        with pytest.raises(AssertionError):
            assert_answers(reference, converted("nvfp4"), prompts, other)


def test_a_loop_written_by_hand_keeps_the_phases(reference: TwoModels, converted: Convert) -> None:
    """Each of its later calls has no more tokens than the tail, so all of them are decode."""
    model, ids = converted("nvfp4"), prompt(100)
    tokens = generate(model, ids[None], max_new_tokens=4)[0, 100:]
    out = model(ids[None], use_cache=True)
    rows = [out.logits[0, -1]]
    for token in tokens[:-1]:
        rows.append(model(token.view(1, 1), past_key_values=out.past_key_values).logits[0, -1])
    torch.testing.assert_close(torch.stack(rows).log_softmax(-1), reference.score(ids, tokens, TAIL))


def multiplying_as_decode(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose decoder layers multiply all of their rows by the kernel of a converted model's decode."""
    model = copy.deepcopy(model)
    kind = kernels.select("bf16", torch.device("cpu"), model.dtype)
    for layer in model.model.modules():
        if isinstance(layer, nn.Linear):
            layer.forward = partial(multiplied, kind(layer.weight), layer.bias)
    return model


def multiplied(kernel: PlainKernel, bias: Tensor | None, x: Tensor) -> Tensor:
    return kernel(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("length", "precise"), [(1, True), (TAIL, True), (TAIL + 1, False)])
def test_a_prompt_no_longer_than_the_tail_is_read_as_without_us(dtype: torch.dtype, length: int, precise: bool) -> None:
    """To the last bit, and so is its answer, by kernels that add up in the same order."""
    plain = tiny_qwen3(dtype)
    logits = []
    for model in (multiplying_as_decode(plain), mixquant.convert_(copy.deepcopy(plain), "nvfp4")):
        with recorded_logits(model) as steps:
            generate(model, prompt(length)[None])
        logits.append(torch.cat(steps))
    assert torch.equal(*logits) is precise
