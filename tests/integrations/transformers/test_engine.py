"""The evaluator's engine on Transformers: forced answers run as decode, arms are what policies say, drafts are free."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import mixquant
from mixquant import Policy
from mixquant.errors import InputError
from mixquant.evaluate.arms import Arm
from mixquant.evaluate.engine import Query
from mixquant.integrations.transformers import engine as engine_module
from mixquant.integrations.transformers import ragged
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.ragged import Windows, extend, prefill
from mixquant.model import arms
from tests.conftest import PHASE, VOCABULARY, tiny_qwen3

PROMPTS = [[5, 9, 3, 7, 7, 2, 11], [8, 1, 4, 4], [6], [2, 30, 31, 32, 33, 34, 35, 36, 37]]
ANSWERS = [[6, 2, 9], [3, 10, 12, 5, 1], [4], [9, 9]]
LIMIT = 12
QUERIES = [Query("", prompt, LIMIT) for prompt in PROMPTS]
POLICIES = {
    "bf16": "bf16",
    "phase": PHASE,
    "uniform": "uniform-nvfp4,tail=1",
    "decode-only": "decode-only-nvfp4,tail=1",
}


@pytest.fixture(scope="module")
def backend(phase: PreTrainedModel) -> TransformersBackend:
    """A backend on the tiny float64 model; the fifth token of its first answer ends answers."""
    made = TransformersBackend(copy.deepcopy(phase))
    made.stop = frozenset()
    made.stop = frozenset({made.open("phase").generate(QUERIES)[0][4]})
    return made


@torch.inference_mode()
def stepwise(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits of a hand-written loop that writes the forced answer one token at a time."""
    out = model(torch.tensor([prompt]), use_cache=True)
    rows = [out.logits[0, -1]]
    for token in answer[:-1]:
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], stop: frozenset[int]) -> list[int]:
    """What a hand-written loop writes."""
    answer: list[int] = []
    out = model(torch.tensor([prompt]), use_cache=True)
    while True:
        answer.append(int(out.logits[0, -1].argmax()))
        if answer[-1] in stop or len(answer) == LIMIT:
            return answer
        out = model(torch.tensor([[answer[-1]]]), past_key_values=out.past_key_values)


@pytest.mark.parametrize("arm", POLICIES)
def test_forced_answers_equal_writing_them_under_the_arms_policy(
    arm: str, backend: TransformersBackend, converted: Callable[..., PreTrainedModel]
) -> None:
    model = converted(POLICIES[arm])
    for prompt, answer, logits in zip(PROMPTS, ANSWERS, backend.open(arm).score(QUERIES, ANSWERS), strict=True):
        assert (logits - stepwise(model, prompt, answer)).abs().max() < 1e-8


@pytest.mark.parametrize("arm", ["phase", "decode-only"])
def test_a_longer_tail_is_decode_in_prompts_of_any_length(
    arm: str, backend: TransformersBackend, converted: Callable[..., PreTrainedModel]
) -> None:
    """Prompts shorter than the tail among them."""
    longer = TransformersBackend(copy.deepcopy(converted({"prefill": "nvfp4", "tail": 4})))
    longer.stop = backend.stop
    found = longer.open(arm).score(QUERIES, ANSWERS)
    model = converted(dataclasses.replace(mixquant.Policy.parse(POLICIES[arm]), tail=4))
    for prompt, answer, logits in zip(PROMPTS, ANSWERS, found, strict=True):
        assert (logits - stepwise(model, prompt, answer)).abs().max() < 1e-8
    assert longer.open(arm).generate(QUERIES, ANSWERS) == [greedy(model, prompt, backend.stop) for prompt in PROMPTS]
    control = backend.open(arm).score(QUERIES, ANSWERS)
    assert (found[0] - control[0]).abs().max() > 1e-4


def test_arms_differ_from_each_other(backend: TransformersBackend) -> None:
    scores = [backend.open(arm).score(QUERIES[:2], ANSWERS[:2]) for arm in POLICIES]
    for i, ours in enumerate(scores):
        for theirs in scores[:i]:
            assert all((a - b).abs().max() > 1e-2 for a, b in zip(ours, theirs, strict=True))


def test_the_control_is_the_reference_in_other_batches(backend: TransformersBackend) -> None:
    reference, control = (backend.open(arm).score(QUERIES, ANSWERS) for arm in ("bf16", "bf16-control"))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(reference, control, strict=True))
    assert [len(backend.open(arm)._parts(QUERIES)) for arm in ("bf16", "bf16-control")] == [1, 2]


@pytest.mark.parametrize("arm", POLICIES)
def test_answers_equal_a_loop_that_writes_token_by_token(
    arm: str, backend: TransformersBackend, converted: Callable[..., PreTrainedModel]
) -> None:
    model = converted(POLICIES[arm])
    expected = [greedy(model, prompt, backend.stop) for prompt in PROMPTS]
    assert backend.open(arm).generate(QUERIES) == expected
    if arm == "phase":
        assert len(expected[0]) <= 5, "the stop token ends an answer"
        assert LIMIT in map(len, expected)


tokens = st.integers(0, VOCABULARY - 1)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_draft_never_changes_an_answer(data: st.DataObject, backend: TransformersBackend) -> None:
    engine = backend.open("phase")
    plain = engine.generate(QUERIES)
    drafts = []
    for answer in plain:  # right for a while, then wrong, then right again, and of any length
        draft = [data.draw(tokens) if data.draw(st.integers(0, 4)) == 0 else token for token in answer]
        drafts.append(draft[: data.draw(st.integers(0, len(draft)))] + data.draw(st.lists(tokens, max_size=4)))
    assert engine.generate(QUERIES, drafts) == plain


def test_a_right_draft_costs_no_further_forward(backend: TransformersBackend) -> None:
    engine = backend.open("phase")
    answers = engine.generate(QUERIES)
    engine.score(QUERIES, answers)
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    handle = backend.model.register_forward_hook(count)
    assert engine.generate(QUERIES, answers) == answers
    assert forwards == 0
    assert engine.generate(QUERIES, [[], *answers[1:]]) == answers
    assert forwards > 0
    handle.remove()


def test_arms_share_the_prompts_that_they_read_alike(backend: TransformersBackend) -> None:
    read = []
    for arm in POLICIES:
        backend.open(arm).score(QUERIES, ANSWERS)
        read.append(backend.read(None if arms.quantizes(arm)[0] else "precise", QUERIES))
    bf16, phase, uniform, decode_only = read
    assert bf16 is decode_only
    assert phase is uniform
    assert bf16 is not phase


def test_batch_mates_do_not_change_a_sequence(backend: TransformersBackend) -> None:
    together = backend.open("phase").score(QUERIES, ANSWERS)
    for query, answer, logits in zip(QUERIES, ANSWERS, together, strict=True):
        (alone,) = backend.open("phase").score([query], [answer])
        assert (logits - alone).abs().max() < 1e-10


def test_columns_that_were_not_kept_are_never_seen(phase: PreTrainedModel) -> None:
    _, longer = extend(phase, prefill(phase, PROMPTS[:2]), [[1, 2, 3], [4, 5, 6]])
    kept = longer.keep([1, 2], 3)
    assert kept.lengths.tolist() == [8, 6]
    logits, _ = extend(phase, kept, [[7], [8]])
    everything, _ = extend(phase, longer, [[7], [8]])
    for place, (prompt, tokens) in enumerate(zip(PROMPTS[:2], ([1, 7], [4, 5, 8]), strict=True)):
        expected, _ = extend(phase, prefill(phase, [prompt]), [tokens])
        assert (logits[place, 0] - expected[0, -1]).abs().max() < 1e-10
        assert (everything[place, 0] - expected[0, -1]).abs().max() > 1e-3


def test_dropping_columns_changes_nothing(phase: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "SPARE_COLUMNS", 0)
    _, longer = extend(phase, prefill(phase, PROMPTS), [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]])
    kept = longer.keep([1, 2, 0, 1], 4)
    compact = kept.compact()
    assert compact.mask.shape[1] == max(kept.lengths.tolist()) < kept.mask.shape[1]
    assert torch.equal(compact.lengths, kept.lengths)
    for a, b in zip(extend(phase, kept, [[7]] * 4)[0], extend(phase, compact, [[7]] * 4)[0], strict=True):
        assert (a - b).abs().max() < 1e-10


def test_an_arm_with_min_prompt_is_for_vllm(phase: PreTrainedModel) -> None:
    asked = {"mine": Arm(name="mine", policy=Policy(prefill="nvfp4", min_prompt=9))}
    with pytest.raises(InputError, match="min_prompt=9 is for vLLM: leave it out, or use --engine vllm"):
        TransformersBackend(phase, asked).open("mine")


def test_an_arm_with_a_storage_of_its_own_is_for_vllm(phase: PreTrainedModel) -> None:
    asked = {"mine": Arm(name="mine", policy=Policy(prefill="fp8", storage="nested"))}
    with pytest.raises(InputError, match="storage=nested would load the model anew for one arm: leave it out"):
        TransformersBackend(phase, asked).open("mine")


@pytest.mark.parametrize("tail", [0, 1, 3, 40])
def test_arms_of_any_tail_and_format_run_side_by_side(
    tail: int, phase: PreTrainedModel, backend: TransformersBackend, converted: Callable[..., PreTrainedModel]
) -> None:
    """On one loaded model, each as a model converted to its own policy writes."""
    asked = {"mine": Policy(prefill="nvfp4", tail=tail), "other": Policy(prefill="int8", decode="int8", tail=tail)}
    beside = TransformersBackend(
        copy.deepcopy(phase), {name: Arm(name=name, policy=policy) for name, policy in asked.items()}
    )
    beside.stop = backend.stop
    for name, policy in asked.items():
        model = converted(policy)
        engine = beside.open(name)
        for prompt, answer, logits in zip(PROMPTS, ANSWERS, engine.score(QUERIES, ANSWERS), strict=True):
            with mixquant.prompt_length(model, len(prompt)):
                assert (logits - stepwise(model, prompt, answer)).abs().max() < 1e-8
        for prompt, answer in zip(PROMPTS, engine.generate(QUERIES), strict=True):
            with mixquant.prompt_length(model, len(prompt)):
                assert answer == greedy(model, prompt, backend.stop)
        kernels = [kernel for names in engine.kernels.values() for kernel in names]
        assert any(policy.prefill in kernel for kernel in kernels), kernels
    first, control = (beside.open(name).score(QUERIES, ANSWERS) for name in ("mine", "phase"))
    assert (tail == 1) == all(torch.equal(a, b) for a, b in zip(first, control, strict=True))


def test_a_quantized_arms_control_is_the_arm_in_other_batches_and_kernels(
    backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[bool] = []

    def counted(model: PreTrainedModel, prompts: list[list[int]], masked: bool = False) -> ragged.Ragged:
        reads.append(masked)
        return prefill(model, prompts, masked)

    monkeypatch.setattr(engine_module, "prefill", counted)
    backend._prompts.clear()
    arm, control = (backend.open(name).score(QUERIES, ANSWERS) for name in ("phase", "phase-control"))
    assert all((a - b).abs().max() < 1e-8 for a, b in zip(arm, control, strict=True))
    assert reads == [False, True, True], "whole, and in two halves through the kernel that takes masks"


@pytest.mark.parametrize(("free", "kept"), [(None, 2), (1 << 30, 2), (0, 1)])
def test_prompt_caches_leave_half_of_the_memory_free(
    free: int | None, kept: int, backend: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too little, the older of two kinds goes before a third is read, and figures stay as they are."""
    monkeypatch.setattr(engine_module, "available_bytes", lambda device: free)
    backend._prompts.clear()
    exact = backend.open("bf16").score(QUERIES, ANSWERS)
    backend.open("phase").score(QUERIES, ANSWERS)
    assert len(backend._prompts) == 2, "the last two stay, whatever they take"
    backend._make_room((None, *(tuple(query.ids) for query in QUERIES)))
    assert len(backend._prompts) == kept
    again = backend.open("bf16").score(QUERIES, ANSWERS)
    assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))


@pytest.fixture(scope="module", params=[1, 0], ids=["some layers", "every layer"])
def sliding(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model whose later layers, or all, see the last eight tokens."""
    model = tiny_qwen3(sliding_window=8, use_sliding_window=True, max_window_layers=request.param)
    return mixquant.convert_(model.double(), PHASE)


@pytest.mark.parametrize("arm", ["bf16", "phase"])
def test_sliding_windows_see_what_the_model_itself_lets_them_see(arm: str, sliding: PreTrainedModel) -> None:
    """Its own masks and cache, token by token: prompts and answers are longer than the window."""
    prompts = [list(range(2, 23)), [5, 9, 3], list(range(30, 44))]
    answers = [list(range(3, 15)), list(range(20, 32)), [7, 8]]
    queries = [Query("", prompt, LIMIT) for prompt in prompts]
    found = TransformersBackend(sliding).open(arm).score(queries, answers)
    with arms.running(sliding, arm):
        for prompt, answer, logits in zip(prompts, answers, found, strict=True):
            assert (logits - stepwise(sliding, prompt, answer)).abs().max() < 1e-8


def test_a_window_changes_what_is_seen(sliding: PreTrainedModel) -> None:
    """The control of the test above: with the window forgotten, long prompts come out otherwise, short ones do not."""
    queries = [Query("", list(range(2, 23)), LIMIT), Query("", [5, 9, 3], LIMIT)]
    answers = [[3, 4], [3, 4]]
    far, near = TransformersBackend(sliding).open("bf16").score(queries, answers)
    unbound = Windows.of(sliding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Windows, "of", classmethod(lambda cls, model: dataclasses.replace(unbound, window=None)))
        other_far, other_near = TransformersBackend(sliding).open("bf16").score(queries, answers)
    assert (far - other_far).abs().max() > 1e-3
    assert (near - other_near).abs().max() < 1e-10


def test_chunked_attention_is_refused(phase: PreTrainedModel) -> None:
    model = copy.deepcopy(phase)
    model.config.layer_types = ["chunked_attention"] * model.config.num_hidden_layers
    with pytest.raises(InputError, match="--engine vllm"):
        prefill(model, PROMPTS)
