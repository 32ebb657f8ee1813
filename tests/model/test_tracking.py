"""Forwards without generate: where the prompt ends follows from the call, or is said by prompt_length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, StaticCache

import mixquant
from mixquant.model import linear
from mixquant.model.explain import phase_linears
from mixquant.model.tracking import cache_argument
from tests.conftest import PHASE, tiny_qwen3
from tests.integrations.transformers.reference import CONTROL, EXACT, TwoModels, answer, difference, generate

pytestmark = pytest.mark.usefixtures("_no_grad")

Convert = Callable[..., PreTrainedModel]
Prompts = list[Tensor]


@pytest.fixture
def _no_grad() -> object:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def answers(plain: PreTrainedModel, prompts: Prompts) -> Prompts:
    """Some answer to each prompt, of different lengths; scoring takes any."""
    return [generate(plain, prompt[None])[0, len(prompt) : len(prompt) + 6 + row] for row, prompt in enumerate(prompts)]


def read(pair: TwoModels, prompt: Tensor, tail: int) -> Tensor:
    """Log-probs after every prompt token: the reader's, then the writer's for the tail."""
    cache = pair.new_cache()
    parts = [(pair.reader, prompt[: len(prompt) - tail]), (pair.writer, prompt[len(prompt) - tail :])]
    logits = [model(part[None], past_key_values=cache).logits[0] for model, part in parts if len(part)]
    return torch.cat(logits).log_softmax(-1)


def write(model: nn.Module, prompt: Tensor, answer: Tensor, cache: object) -> Tensor:
    """Log-probs along `answer` by a loop as users write it: the prompt in one forward, then token by token.

    The cache goes by its newest name here, and by its old one in other tests: Transformers 5.24 takes both.
    """
    past = {cache_argument(getattr(model, "_orig_mod", model)): cache}  # torch.compile's wrapper takes anything
    steps = [model(prompt[None], **past).logits[0, -1]]
    steps += [model(token.view(1, 1), **past).logits[0, -1] for token in answer[:-1]]
    return torch.stack(steps).log_softmax(-1)


def assert_equals(ours: Tensor, score: Callable[[TwoModels], Tensor], reference: TwoModels) -> None:
    assert difference(ours, score(reference)) < EXACT
    for control in reference.controls:
        assert difference(ours, score(control)) > CONTROL


@pytest.mark.parametrize("tail", [0, 1, 5])
def test_the_tokens_of_a_call_are_the_end_of_a_prompt(
    reference: TwoModels, converted: Convert, prompts: Prompts, tail: int
) -> None:
    model, prompt = converted({"prefill": "nvfp4", "tail": tail}), prompts[0]
    expected = read(reference, prompt, tail)
    by_ids = model(prompt[None]).logits[0].log_softmax(-1)
    by_embeddings = model(inputs_embeds=model.get_input_embeddings()(prompt[None])).logits[0].log_softmax(-1)
    assert difference(by_ids, expected) < EXACT
    assert difference(by_embeddings, expected) < EXACT
    assert difference(by_ids, read(reference, prompt, len(prompt))) > CONTROL
    other_tail = read(reference, prompt, tail + 1)
    assert difference(by_ids, other_tail) > CONTROL


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
def test_handwritten_loop_is_phase_correct(
    plain: PreTrainedModel, reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, cache: type
) -> None:
    for prompt in prompts:
        tokens = generate(plain, prompt[None])[0, len(prompt) :]
        room = {"max_cache_len": 40} if cache is StaticCache else {}
        ours = write(phase, prompt, tokens, cache(config=plain.config, **room))
        assert_equals(ours, lambda pair, p=prompt, t=tokens: pair.score(p, t), reference)


def test_base_model_called_directly_follows_the_same_rule(
    plain: PreTrainedModel, reference: TwoModels, phase: PreTrainedModel, prompts: Prompts
) -> None:
    hidden = phase.model(prompts[0][None]).last_hidden_state
    ours = plain.lm_head(hidden)[0].log_softmax(-1)
    assert difference(ours, read(reference, prompts[0], 1)) < EXACT
    for all_quantized_or_plain in (0, len(prompts[0])):
        assert difference(ours, read(reference, prompts[0], all_quantized_or_plain)) > CONTROL


def test_prompt_length_scores_an_answer_as_decode(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, answers: Prompts
) -> None:
    for prompt, tokens in zip(prompts, answers, strict=True):
        forced = torch.cat((prompt, tokens))[None]
        with mixquant.prompt_length(phase, len(prompt)):
            ours = phase(forced).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert_equals(ours, lambda pair, p=prompt, t=tokens: pair.score(p, t), reference)
        unsaid = phase(forced).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert difference(unsaid, ours) > CONTROL


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_prompt_length_of_each_sequence_in_a_right_padded_batch(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, answers: Prompts, kind: Callable[..., object]
) -> None:
    forced = [torch.cat(pair) for pair in zip(prompts, answers, strict=True)]
    ids = nn.utils.rnn.pad_sequence(forced, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(sequence) for sequence in forced], batch_first=True)
    with mixquant.prompt_length(phase, kind([len(prompt) for prompt in prompts])):
        whole = phase(ids, attention_mask=mask).logits
        cache = reference.new_cache()
        start = phase(ids[:, :20], attention_mask=mask[:, :20], past_key_values=cache).logits
        rest = phase(ids[:, 20:], attention_mask=mask, past_key_values=cache).logits  # here one prompt still goes on
    log_probs = whole.log_softmax(-1)
    assert difference(torch.cat((start, rest), 1)[mask.bool()], whole[mask.bool()]) < EXACT
    for row, (prompt, tokens) in enumerate(zip(prompts, answers, strict=True)):
        ours = log_probs[row, len(prompt) - 1 : len(forced[row]) - 1]
        assert_equals(ours, lambda pair, p=prompt, t=tokens: pair.score(p, t), reference)


@pytest.mark.parametrize("chunk", [1, 7, 24])
def test_prompt_length_holds_over_cached_chunks(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, answers: Prompts, chunk: int
) -> None:
    prompt, tokens = prompts[0], answers[0]
    cache = reference.new_cache()
    with mixquant.prompt_length(phase, len(prompt)):
        parts = torch.cat((prompt, tokens))[None].split(chunk, dim=1)
        logits = torch.cat([phase(part, past_key_values=cache).logits for part in parts], 1)
    ours = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert_equals(ours, lambda pair: pair.score(prompt, tokens), reference)


def test_prompt_length_nests_and_ends_with_its_block(phase: PreTrainedModel, prompts: Prompts) -> None:
    ids = prompts[0][None]
    alone = phase(ids).logits
    with mixquant.prompt_length(phase, 10):
        ten = phase(ids).logits
        with mixquant.prompt_length(phase, 5):
            five = phase(ids).logits
            generate(phase, ids)
        assert torch.equal(phase(ids).logits, ten)
        with pytest.raises(KeyboardInterrupt), mixquant.prompt_length(phase, 5):
            raise KeyboardInterrupt
        assert torch.equal(phase(ids).logits, ten)
    assert torch.equal(phase(ids).logits, alone)
    assert min(difference(alone, ten), difference(ten, five), difference(five, alone)) > CONTROL


def test_failed_forward_leaves_nothing_behind(phase: PreTrainedModel, prompts: Prompts) -> None:
    expected = phase(prompts[0][None]).logits
    hook = phase.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phase(prompts[1][None])
    hook.remove()
    assert torch.equal(phase(prompts[0][None]).logits, expected)


def test_wrong_number_of_prompt_lengths_is_refused(phase: PreTrainedModel, prompts: Prompts) -> None:
    expected = phase(prompts[0][None]).logits
    with (
        pytest.raises(mixquant.InputError, match="3 prompt lengths for a batch of 1"),
        mixquant.prompt_length(phase, [1, 2, 3]),
    ):
        phase(prompts[0][None])
    assert torch.equal(phase(prompts[0][None]).logits, expected)


def test_prompt_length_needs_a_converted_model(plain: PreTrainedModel) -> None:
    with pytest.raises(mixquant.InputError, match="convert_"), mixquant.prompt_length(plain, 3):
        pass


def test_forward_without_tokens_is_refused(phase: PreTrainedModel) -> None:
    with pytest.raises(mixquant.InputError, match="neither input_ids nor inputs_embeds"):
        phase.model()


def test_layer_called_alone_is_refused(phase: PreTrainedModel) -> None:
    layer = phase.model.layers[0].mlp.up_proj
    with pytest.raises(mixquant.InputError, match="call the model"):
        layer(torch.zeros(2, 64, dtype=torch.float64))


def test_layer_with_rows_of_its_own_is_refused(plain: PreTrainedModel, prompts: Prompts) -> None:
    model = copy.deepcopy(plain)
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x.repeat(1, 2, 1))[:, : x.shape[1]]
    mixquant.convert_(model, PHASE)
    with pytest.raises(mixquant.InputError, match=r"48 rows in a batch of 24.*ignore"):
        model(prompts[0][None])


def test_deepcopy_has_a_tracker_of_its_own(reference: TwoModels, phase: PreTrainedModel, prompts: Prompts) -> None:
    twin, prompt = copy.deepcopy(phase), prompts[0]
    expected = phase(prompt[None]).logits
    assert torch.equal(twin(prompt[None]).logits, expected)
    with mixquant.prompt_length(phase, 3):
        assert torch.equal(twin(prompt[None]).logits, expected)
        tokens, log_probs = answer(twin, [prompt])
    assert_equals(log_probs[0], lambda pair: pair.score(prompt, tokens[0]), reference)


def test_interleaved_models_do_not_mix_their_phases(
    reference: TwoModels, phase: PreTrainedModel, prompts: Prompts, answers: Prompts
) -> None:
    models = [phase, copy.deepcopy(phase), mixquant.convert_(tiny_qwen3(), PHASE)]
    caches = [reference.new_cache() for _ in models]
    steps: list[list[Tensor]] = [[] for _ in models]
    for step in range(4):
        for row, model in enumerate(models):
            ids = prompts[row] if step == 0 else answers[row][step - 1 : step]
            steps[row].append(model(ids[None], past_key_values=caches[row]).logits[0, -1])
    for row, prompt in enumerate(prompts):
        ours = torch.stack(steps[row]).log_softmax(-1)
        assert_equals(ours, lambda pair, p=prompt, t=answers[row][:4]: pair.score(p, t), reference)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()"])
def test_user_compiled_model_gives_the_same_numbers(prompts: Prompts, how: str) -> None:
    plain = tiny_qwen3(num_hidden_layers=1)
    reference = TwoModels.of(plain)
    model = mixquant.convert_(copy.deepcopy(plain), PHASE)
    if how == "model.compile()":
        model.compile(backend="eager")  # tracing is what meets the plan; float32 norms stay as they are
    compiled = torch.compile(model, backend="eager") if how == "torch.compile(model)" else model
    for prompt in prompts:
        tokens = generate(plain, prompt[None])[0, len(prompt) : len(prompt) + 4]
        ours = write(compiled, prompt, tokens, reference.new_cache())
        assert_equals(ours, lambda pair, p=prompt, t=tokens: pair.score(p, t), reference)
    tokens, log_probs = answer(model, prompts[:1])
    assert_equals(log_probs[0], lambda pair: pair.score(prompts[0], tokens[0]), reference)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_handwritten_step_on_a_static_cache_is_one_graph_and_waits_for_nothing(prompts: Prompts) -> None:
    """As a CUDA graph needs it. Reading the length of a static cache would wait for the device."""
    plain = tiny_qwen3(num_hidden_layers=1)
    model, reference = mixquant.convert_(copy.deepcopy(plain), "fp8,tail=1"), TwoModels.of(plain, "fp8")
    step = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    for prompt in prompts:
        tokens = generate(plain, prompt[None])[0, len(prompt) :]
        cache = StaticCache(config=plain.config, max_cache_len=40)
        steps = [model(prompt[None], past_key_values=cache).logits[0, -1]]
        for token in tokens[:-1]:
            steps.append(step(token.view(1, 1), past_key_values=cache).logits[0, -1])
            assert counters["stats"]["unique_graphs"] == 1
        assert_equals(torch.stack(steps).log_softmax(-1), lambda pair, p=prompt, t=tokens: pair.score(p, t), reference)
    with Reads() as none:
        model(tokens[-1].view(1, 1), past_key_values=cache)
    with Reads() as some, mixquant.prompt_length(model, len(prompt)):
        model(tokens[-1].view(1, 1), past_key_values=cache)
    assert (none.count, some.count > 0) == (0, True)


class Reads(TorchDispatchMode):
    """Counts numbers that go from a tensor to Python: on a GPU, each waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("tail", [0, 1])
def test_generate_waits_for_a_static_cache_no_more_often_than_the_plain_model(
    plain: PreTrainedModel, converted: Convert, prompts: Prompts, tail: int
) -> None:
    counts = []
    for model in (plain, converted({"prefill": "nvfp4", "tail": tail})):
        for new in (4, 12):
            with Reads() as reads:
                generate(model, prompts[0][None], cache_implementation="static", max_new_tokens=new)
            counts.append(reads.count)
    plain_4, plain_12, ours_4, ours_12 = counts
    assert plain_12 - plain_4 == ours_12 - ours_4 > 0  # generate's own
    assert ours_4 <= plain_4 + 2  # until the prompt is behind


def test_an_interrupted_forward_leaves_no_plan(phase: PreTrainedModel, prompts: Prompts) -> None:
    """torch runs no forward hook on KeyboardInterrupt, so the next forward must not trust the last plan."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    prompt = prompts[0].unsqueeze(0)
    expected = phase(prompt).logits
    for interrupted in (prompt[:, :1], prompt[:, :5]):
        handle = phase.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            phase(interrupted)
        handle.remove()
        assert torch.equal(phase(prompt).logits, expected)


def test_a_kept_cache_needs_a_mask_over_it(phase: PreTrainedModel, prompts: Prompts) -> None:
    cache = phase(prompts[0].unsqueeze(0), use_cache=True).past_key_values
    with pytest.raises(mixquant.InputError, match="attention_mask over both"):
        phase.generate(prompts[2].unsqueeze(0), past_key_values=cache, max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("columns", [-3, [4, -1]])
def test_prompt_lengths_are_counts(phase: PreTrainedModel, columns: object) -> None:
    with pytest.raises(mixquant.InputError, match="0 or more"), mixquant.prompt_length(phase, columns):
        pass


class KeepsItsOwnPast(Qwen3ForCausalLM):
    """A model that leaves the cache it is given empty, as RecurrentGemma did before Transformers 5.24."""

    def forward(self, input_ids=None, cache=None, past_key_values=None, **options):  # type: ignore[no-untyped-def]
        return super().forward(input_ids=input_ids, **options | {"use_cache": False})


def test_a_past_that_nobody_counts_is_refused() -> None:
    """Each of its steps would look like the start of a prompt."""
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "hidden_size": 32, "head_dim": 16, "intermediate_size": 64}
    model = KeepsItsOwnPast(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
    mixquant.convert_(model, PHASE)
    with pytest.raises(mixquant.InputError, match="cannot count"):
        model.generate(torch.arange(1, 11).unsqueeze(0), max_new_tokens=4, do_sample=False, pad_token_id=0)


# --- what a forward costs -------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The index lists that are brought to the device."""
    seen: list[list[int]] = []
    original = linear.upload
    monkeypatch.setattr(linear, "upload", lambda rows, device: seen.append(rows) or original(rows, device))
    return seen


def test_a_forward_brings_its_decode_rows_to_the_device_once(
    phase: PreTrainedModel, prompts: Prompts, uploads: list[list[int]]
) -> None:
    batch = torch.stack([prompt[:9] for prompt in prompts])
    for forwards in (1, 2):
        phase(batch)
        assert uploads == [[8, 17, 26]] * forwards
    layers = list(phase_linears(phase))
    forget = [
        layer.register_forward_pre_hook(lambda layer, _: setattr(layer.state, "_uploaded", None)) for layer in layers
    ]
    uploads.clear()
    phase(batch)
    for hook in forget:
        hook.remove()
    assert len(uploads) == len(layers) > 1  # control: every layer needs the index


def test_generate_brings_them_once_for_its_prompt(
    phase: PreTrainedModel, prompts: Prompts, uploads: list[list[int]]
) -> None:
    answer(phase, prompts)
    assert uploads == [[23, 47, 71]]


def test_a_lone_prompts_tail_needs_no_index(phase: PreTrainedModel, prompts: Prompts, uploads: list[list[int]]) -> None:
    phase(prompts[0][None])
    assert uploads == []
