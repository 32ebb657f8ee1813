"""Sampling, beams, drafts, second turns, streams and threads: each way to decode equals its two models."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, TextIteratorStreamer, TextStreamer

import mixquant
from tests.conftest import PHASE, tiny_qwen3
from tests.integrations.transformers.reference import (
    CONTROL,
    EXACT,
    NEW_TOKENS,
    TwoModels,
    answer,
    assert_answers,
    assert_equals,
    difference,
    generate,
    left_padded,
    recorded_logits,
)

Prompts = list[Tensor]


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    """Another model with the same tokens, to draft for the large one."""
    return tiny_qwen3(num_hidden_layers=1)


def test_sampling_draws_what_two_models_draw(reference: TwoModels, phase: PreTrainedModel, prompts: Prompts) -> None:
    torch.manual_seed(5)
    sampled, log_probs = answer(phase, prompts, do_sample=True, top_k=0)
    torch.manual_seed(5)
    assert torch.equal(sampled, reference.generate(prompts, do_sample=True, top_k=0))
    assert not torch.equal(sampled, answer(phase, prompts)[0])
    for prompt, tokens, ours in zip(prompts, sampled, log_probs, strict=True):
        assert_equals(reference, prompt, tokens, ours, greedy=False)


def test_returned_sequences_share_a_prompt(reference: TwoModels, phase: PreTrainedModel, prompts: Prompts) -> None:
    sampled, log_probs = answer(phase, prompts[:1], do_sample=True, num_return_sequences=3)
    assert len(sampled) == 3
    for tokens, ours in zip(sampled, log_probs, strict=True):
        assert_equals(reference, prompts[0], tokens, ours, greedy=False)


def test_beams_are_those_of_two_models(reference: TwoModels, phase: PreTrainedModel, prompts: Prompts) -> None:
    options = {"num_beams": 3, "num_return_sequences": 3}
    ids, mask = left_padded(prompts)
    with recorded_logits(phase) as steps:
        found = generate(phase, ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **options)
    beams = found.sequences[:, ids.shape[1] :]
    assert torch.equal(beams, reference.generate(prompts, rows=3, **options))
    log_probs = torch.stack(steps).log_softmax(-1)  # [step, row, token]; rows move between steps
    for row, (tokens, path) in enumerate(zip(beams, found.beam_indices, strict=True)):
        ours = log_probs[torch.arange(NEW_TOKENS), path.long()]
        assert_equals(reference, prompts[row // 3], tokens, ours, greedy=False)


@pytest.mark.parametrize("draft", ["prompt lookup", "plain assistant", "converted assistant", "own layers"])
def test_assisted_decoding_verifies_drafts_as_decode(
    reference: TwoModels, phase: PreTrainedModel, small: PreTrainedModel, prompts: Prompts, draft: str
) -> None:
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "plain assistant": {"assistant_model": small},
        "converted assistant": {"assistant_model": mixquant.convert_(copy.deepcopy(small), PHASE)},
        "own layers": {"assistant_early_exit": 1},
    }[draft]
    prompt = prompts[0].repeat(2)  # a repeated prompt gives the lookup something to find
    if draft == "own layers":  # the drafts' logits are recorded too: tokens only
        greedy, _ = answer(phase, [prompt])
        assert torch.equal(answer(phase, [prompt], **options)[0], greedy)
    else:
        assert_answers(reference, phase, [prompt], **options)


def test_accepted_drafts_are_decode(
    plain: PreTrainedModel, reference: TwoModels, phase: PreTrainedModel, prompts: Prompts
) -> None:
    lengths: list[int] = []
    hook = phase.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        assert_answers(reference, phase, prompts[:1], assistant_model=plain)
    finally:
        hook.remove()
    assert len(lengths) < NEW_TOKENS  # several tokens a step were accepted
    assert max(lengths[1:]) > 1


@pytest.mark.parametrize("sequences", [1, 3])
def test_prompt_embeddings_are_prefill(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, sequences: int
) -> None:
    ids, mask = left_padded(prompts[:sequences])
    inputs = {"inputs_embeds": phase.get_input_embeddings()(ids)}
    with recorded_logits(phase) as steps:  # a single sequence goes without a mask
        answers = generate(phase, **inputs, **({"attention_mask": mask} if sequences > 1 else {}))
    log_probs = torch.stack(steps, 1).log_softmax(-1)
    for prompt, tokens, ours in zip(prompts[:sequences], answers, log_probs, strict=True):
        assert_equals(reference, prompt, tokens, ours)


def assert_second_turn(
    reference: TwoModels, prompt: Tensor, first: Tensor, conversation: Tensor, tokens: Tensor, log_probs: Tensor
) -> None:
    """`tokens` answer a `conversation` whose cache holds `prompt` and its `first` answer."""

    def score(pair: TwoModels) -> Tensor:
        cache = pair.new_cache()
        pair.score(prompt, first, cache=cache)
        return pair.score(conversation, tokens, cache=cache)

    assert difference(log_probs, score(reference)) < EXACT
    assert torch.equal(tokens, log_probs.argmax(-1))
    for control in reference.controls:
        assert difference(log_probs, score(control)) > CONTROL


@pytest.mark.parametrize("give", ["the whole conversation", "only the new tokens"])
def test_second_turn_reads_the_tool_result_as_prefill(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, give: str
) -> None:
    prompt, tool_result = prompts[:2]
    first = generate(phase, prompt[None], return_dict_in_generate=True)
    conversation = torch.cat((first.sequences[0], tool_result))
    new = conversation[first.past_key_values.get_seq_length() :] if give == "only the new tokens" else conversation
    mask = torch.ones(1, len(conversation), dtype=torch.long)
    with recorded_logits(phase) as steps:
        second = generate(phase, new[None], attention_mask=mask, past_key_values=first.past_key_values)
    tokens, log_probs = second[0, len(new) :], torch.cat(steps).log_softmax(-1)
    assert_second_turn(reference, prompt, first.sequences[0, len(prompt) :], conversation, tokens, log_probs)


def test_second_turn_of_a_left_padded_batch(reference: TwoModels, phase: PreTrainedModel, prompts: Prompts) -> None:
    ids, mask = left_padded(prompts)
    first = generate(phase, ids, attention_mask=mask, return_dict_in_generate=True)
    conversation = torch.cat((first.sequences, torch.stack([prompts[0][:6]] * 3)), 1)
    mask = torch.cat((mask, torch.ones(3, conversation.shape[1] - mask.shape[1], dtype=torch.long)), 1)
    with recorded_logits(phase) as steps:
        second = generate(phase, conversation, attention_mask=mask, past_key_values=first.past_key_values)
    log_probs = torch.stack(steps, 1).log_softmax(-1)
    for row, prompt in enumerate(prompts):
        own = conversation[row, ids.shape[1] - len(prompt) :]
        answers = first.sequences[row, ids.shape[1] :], second[row, conversation.shape[1] :]
        assert_second_turn(reference, prompt, answers[0], own, answers[1], log_probs[row])


def test_guidance_reads_the_negative_prompt_as_prefill(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts
) -> None:
    scale, (prompt, negative) = 1.5, prompts[:2]
    tokens = generate(phase, prompt[None], guidance_scale=scale, negative_prompt_ids=negative[None])[0, len(prompt) :]

    def guided(pair: TwoModels) -> Tensor:
        wanted, unwanted = pair.score(prompt, tokens), pair.score(negative, tokens)
        return (unwanted + scale * (wanted - unwanted)).argmax(-1)

    assert torch.equal(tokens, guided(reference))
    for control in reference.controls:
        assert not torch.equal(tokens, guided(control))


class SpellOut:
    """As much of a tokenizer as streamers need."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f"{int(token)} " for token in ids)


def test_streamed_tokens_are_the_answer(
    capsys: pytest.CaptureFixture[str], reference: TwoModels, phase: PreTrainedModel, prompts: Prompts
) -> None:
    prompt = prompts[0]
    tokens, log_probs = answer(phase, [prompt], streamer=TextStreamer(SpellOut(), skip_prompt=True))
    assert [int(word) for word in capsys.readouterr().out.split()] == tokens[0].tolist()
    assert_equals(reference, prompt, tokens[0], log_probs[0])


def test_tokens_stream_out_of_a_thread(plain: PreTrainedModel, phase: PreTrainedModel, prompts: Prompts) -> None:
    prompt = prompts[0]
    expected, _ = answer(phase, [prompt])
    streamer = TextIteratorStreamer(SpellOut(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=generate, args=(phase, prompt[None]), kwargs={"streamer": streamer})
    thread.start()
    words = "".join(streamer).split()
    thread.join()
    assert [int(word) for word in words] == expected[0].tolist()
    assert not torch.equal(answer(plain, [prompt])[0], expected)


def test_threads_that_generate_on_one_model_wait_for_each_other(
    plain: PreTrainedModel, phase: PreTrainedModel, prompts: Prompts
) -> None:
    alone = [generate(phase, prompt[None]) for prompt in prompts]
    assert not torch.equal(alone[0], generate(plain, prompts[0][None]))
    together: dict[int, list[Tensor]] = {row: [] for row in range(len(prompts))}
    start = threading.Barrier(len(prompts))

    def work(row: int) -> None:
        start.wait()
        for _ in range(4):
            together[row].append(generate(phase, prompts[row][None]))

    threads = [threading.Thread(target=work, args=(row,)) for row in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row, expected in enumerate(alone):
        assert len(together[row]) == 4
        assert all(torch.equal(result, expected) for result in together[row])


def test_another_converted_model_may_run_inside_generate(
    reference: TwoModels, phase: PreTrainedModel, small: PreTrainedModel, prompts: Prompts
) -> None:
    other = mixquant.convert_(copy.deepcopy(small), PHASE)
    expected = other(prompts[1][None]).logits

    def disturb(ids: Tensor, scores: Tensor) -> Tensor:
        assert torch.equal(other(prompts[1][None]).logits, expected)
        generate(other, prompts[2][None], max_new_tokens=2)
        return scores

    assert_answers(reference, phase, prompts[:1], logits_processor=[disturb])
