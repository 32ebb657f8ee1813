"""generate on a converted model equals a quantized model that reads and a plain model that writes, in every mode."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel, TextIteratorStreamer, TextStreamer

import mixquant
from mixquant.kernels import Rejected
from mixquant.kernels.cpu import Int8OneDNN
from tests.conftest import VOCABULARY, seeded, tiny_qwen3
from tests.integrations.transformers.reference import (
    CONTROL,
    EXACT,
    NEW_TOKENS,
    TwoModels,
    answer,
    assert_equals,
    difference,
    generate,
    left_padded,
    quantized_copy,
    recorded_logits,
)

Convert = Callable[..., PreTrainedModel]
Prompts = list[Tensor]


@pytest.fixture(scope="module")
def reference(plain: PreTrainedModel) -> TwoModels:
    return TwoModels.of(plain)


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    """Another model with the same tokens, to draft for the large one."""
    return tiny_qwen3(num_hidden_layers=1)


def assert_answers(
    reference: TwoModels, model: PreTrainedModel, prompts: Prompts, tail: int = 1, **options: Any
) -> None:
    """Greedy answers to a left-padded batch are those of the reference to each prompt alone."""
    for prompt, tokens, log_probs in zip(prompts, *answer(model, prompts, **options), strict=True):
        assert len(tokens) == NEW_TOKENS
        assert_equals(reference, prompt, tokens, log_probs, tail)


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
    model = mixquant.convert_(copy.deepcopy(plain), format if arm == "phase" else f"{arm}-{format}")
    prompt = prompts[0]
    tokens, log_probs = answer(model, [prompt])
    for name, pair in pairs.items():
        distance = difference(log_probs[0], pair.score(prompt, tokens[0]))
        assert distance < EXACT if name == arm else distance > CONTROL


TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

FAMILIES = {
    "biases": ("OPTConfig", {"ffn_dim": 128, "word_embed_proj_dim": 64, "num_key_value_heads": 4}),
    "fused projections": ("Phi3Config", {}),
    "sliding window": (
        "Gemma3TextConfig", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "convolution state": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "experts": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 2},
    ),
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    import transformers

    name, changes = FAMILIES[family]
    config = getattr(transformers, name)(**TINY | changes)
    model = AutoModelForCausalLM.from_config(config).double()
    if family == "experts":
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return seeded(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families_equal_two_models(prompts: Prompts, family: str) -> None:
    model = build(family)
    phase = mixquant.convert_(copy.deepcopy(model), "nvfp4")
    for options in ({}, {"prefill_chunk_size": 7}):
        assert_answers(TwoModels.of(model), phase, prompts, **options)


def test_opt_runs_without_generate() -> None:
    """Its head calls the decoder past the base model, where the plan of a forward is made for all others."""
    model = build("biases")
    phase = mixquant.convert_(copy.deepcopy(model), "nvfp4")
    ids = torch.arange(3, 23).unsqueeze(0)
    alone = phase(ids).logits
    with mixquant.prompt_length(phase, ids.shape[1]):
        assert torch.equal(phase(ids).logits, alone)
    uniform = mixquant.convert_(model, "uniform-nvfp4")(ids).logits
    assert torch.equal(alone[:, :-1], uniform[:, :-1])
    assert not torch.equal(alone[:, -1], uniform[:, -1])


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
        "converted assistant": {"assistant_model": mixquant.convert_(copy.deepcopy(small), "nvfp4")},
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
    other = mixquant.convert_(copy.deepcopy(small), "nvfp4")
    expected = other(prompts[1][None]).logits

    def disturb(ids: Tensor, scores: Tensor) -> Tensor:
        assert torch.equal(other(prompts[1][None]).logits, expected)
        generate(other, prompts[2][None], max_new_tokens=2)
        return scores

    assert_answers(reference, phase, prompts[:1], logits_processor=[disturb])


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


def compiled(backend: str, **options: Any) -> CompileConfig:
    config = CompileConfig(backend=backend, mode=None, **options)
    config._compile_all_devices = True  # otherwise generate compiles on accelerators only
    return config


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_decode_is_one_graph_and_equals_two_models(prompts: Prompts, backend: str) -> None:
    model = build("biases")  # its norms stay in float64: those in float32 differ by 1e-6 once inductor fuses them
    phase = mixquant.convert_(copy.deepcopy(model), "nvfp4")
    torch._dynamo.reset()
    counters.clear()
    options = {"cache_implementation": "static", "compile_config": compiled(backend, fullgraph=True)}
    assert_answers(TwoModels.of(model), phase, prompts, **options)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert not counters["graph_break"]
    assert_answers(TwoModels.of(model), phase, prompts, **options)
    assert counters["stats"]["unique_graphs"] == graphs  # the second call reuses the graph


@pytest.mark.slow
def test_compiled_chunked_prefill_equals_two_models(prompts: Prompts) -> None:
    model = build("biases")
    phase = mixquant.convert_(copy.deepcopy(model), "nvfp4")
    torch._dynamo.reset()
    counters.clear()
    options = {"cache_implementation": "static", "compile_config": compiled("eager"), "prefill_chunk_size": 7}
    assert_answers(TwoModels.of(model), phase, prompts, **options)
    assert counters["stats"]["unique_graphs"] > 0


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
