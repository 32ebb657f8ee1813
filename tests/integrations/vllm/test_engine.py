"""The evaluator's vLLM backend: answers forced during decode, on real engines in float32.

Scoring an answer must be writing it: the logits of a free run's own tokens are those that chose them. The controls are
the ways to get it wrong: the answer given as a part of the prompt, and arms that must not be equal.
"""

from __future__ import annotations

import functools
import gc
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.evaluate import arms as evaluated
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.evaluate.metrics import kl_divergence
from mixquant.integrations.vllm import engine
from mixquant.integrations.vllm.engine import VllmBackend, VllmEngine
from mixquant.policy import ARMS, CONTROL, Policy
from tests.folders import name_decode_model, write_quantized
from tests.integrations.vllm import engines

END = 2
LIMIT = 24
QUERIES = [Query("", prompt, LIMIT) for prompt in engines.prompts()]
CROWD = [Query("", prompt, 48) for prompt in engines.prompts((19, 23, 21, 25, 20, 24, 22, 60))]
CROWDS_ANSWERS = [[(7 * place + i) % 60 + 3 for i in range(48)] for place in range(len(CROWD))]
OPTIONS = {
    "dtype": "float32", "max_model_len": 512, "block_size": engines.BLOCK, "num_gpu_blocks_override": 256,
    "max_num_batched_tokens": 96, "max_num_seqs": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend sets variables of this process: other tests must not see them."""
    for name in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    engines._register_kernels_once()


def backend(
    model: Path,
    format: str = "nvfp4",
    end: int | None = END,
    asked: Mapping[str, evaluated.Arm] | None = None,
    **options: Any,
) -> VllmBackend:
    """With tails of 1, since some prompts are shorter than the default."""
    short = {name: evaluated.standard(name, format, tail=1) for name in (*ARMS, "phase-control")}
    tokenizer = SimpleNamespace(eos_token_id=end)
    return VllmBackend(find(model), format, tokenizer, {**short, **(asked or {})}, **OPTIONS | options)  # type: ignore[arg-type]


def start(model: Path, arm: str, **options: Any) -> VllmEngine:
    """A backend's engine; vLLM collects garbage while it starts, but not in what this process has imported."""
    gc.freeze()
    return backend(model, **options).open(arm)


@dataclass(frozen=True)
class Arm:
    """All that one engine said: its free run, that run scored and with vLLM's own figures, and given answers scored."""

    engine: VllmEngine
    answers: list[TokenIds]
    own: list[Tensor]
    logprobs: list[Tensor]
    as_prompt: list[Tensor]
    reference: list[Tensor]
    crowd: list[Tensor]


@pytest.fixture(scope="module")
def arms(folder: Path) -> Callable[[str], Arm]:
    """Every arm's engine is started once, after the one before was closed."""

    @functools.cache
    def ask(name: str) -> Arm:
        reference = None if name == "bf16" else ask("bf16").answers
        with closing(start(folder, name)) as engine:
            return say(engine, reference)

    def say(engine: VllmEngine, reference: list[TokenIds] | None) -> Arm:
        answers = engine.generate(QUERIES)
        free = engines.answers(engine.llm, [query.ids for query in QUERIES], LIMIT)
        logprobs = [torch.tensor(run.logprobs[: len(answer)]) for run, answer in zip(free, answers, strict=True)]
        whole = [query.ids + answer for query, answer in zip(QUERIES, answers, strict=True)]
        prompted = engines.answers(engine.llm, whole, 1, prompt_logprobs=0)
        as_prompt = [torch.tensor(p.prompt_logprobs[-len(a) :]) for p, a in zip(prompted, answers, strict=True)]
        own, forced = engine.score(QUERIES, answers), engine.score(QUERIES, reference or answers)
        crowd = engine.score(CROWD, CROWDS_ANSWERS)
        return Arm(engine, answers, own, logprobs, as_prompt, forced, crowd)

    return ask


def chosen(logits: Sequence[Tensor], answers: Sequence[TokenIds]) -> list[Tensor]:
    """Log-probability of each answer's tokens."""
    return [rows.log_softmax(-1)[range(len(ids)), ids] for rows, ids in zip(logits, answers, strict=True)]


def greatest_difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def divergence(reference: Sequence[Tensor], arm: Sequence[Tensor]) -> float:
    return float(torch.cat([kl_divergence(p, q) for p, q in zip(reference, arm, strict=True)]).mean())


@torch.no_grad()
def model_logits(model: PreTrainedModel, prompt: TokenIds, answer: TokenIds) -> Tensor:
    """Transformers' logits that predict an answer's tokens."""
    logits: Tensor = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits


@pytest.mark.parametrize("name", ARMS)
def test_scoring_an_answer_is_writing_it(arms: Callable[[str], Arm], name: str) -> None:
    arm = arms(name)
    assert [rows.argmax(-1).tolist() for rows in arm.own] == arm.answers
    assert greatest_difference(chosen(arm.own, arm.answers), arm.logprobs) < engines.EXACT


def test_control_an_answer_given_as_prompt_is_another_thing(arms: Callable[[str], Arm]) -> None:
    """In `phase` it would run quantized; in `bf16`, where phases are alike, it makes no difference."""
    phase, plain = arms("phase"), arms("bf16")
    assert greatest_difference(phase.as_prompt, phase.logprobs) > engines.CONTROL
    assert greatest_difference(plain.as_prompt, plain.logprobs) < engines.EXACT


def test_arms_are_told_apart(arms: Callable[[str], Arm]) -> None:
    """Forced as prompt, `phase` would be `uniform`; all three differ from the reference, and from each other."""
    scored = {name: arms(name).reference for name in ("bf16", "phase", "uniform", "decode-only")}
    for name, logits in scored.items():
        for other in set(scored) - {name}:
            assert divergence(logits, scored[other]) > engines.CONTROL


def test_the_reference_is_stock_vllm_and_the_models_own_logits(arms: Callable[[str], Arm], folder: Path) -> None:
    arm = arms("bf16")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = [model_logits(model, query.ids, answer) for query, answer in zip(QUERIES, arm.answers, strict=True)]
    assert [rows.dtype for rows in arm.reference] == [torch.float32] * len(QUERIES)
    assert [rows.shape for rows in arm.reference] == [rows.shape for rows in expected]
    assert greatest_difference(arm.reference, expected) < 1e-4  # logits reach 10: a part in 100,000
    assert greatest_difference(arms("phase").reference, expected) > engines.CONTROL


def test_an_arm_of_any_policy_runs_under_it(folder: Path, arms: Callable[[str], Arm]) -> None:
    """A tail as long as every prompt leaves nothing quantized, in another batch composition as well."""
    asked = {
        name: evaluated.Arm(name=name, policy=Policy(prefill="nvfp4", tail=500)) for name in ("mine", "mine-control")
    }
    for name in asked:
        gc.freeze()
        with closing(backend(folder, asked=asked).open(name)) as engine:
            scores = engine.score(QUERIES, arms("bf16").answers)
            assert [list(places) for places in engine._batches(3)] == {
                "mine": [[0, 1, 2]], "mine-control": [[2, 1], [0]]
            }[name]  # fmt: skip
        assert greatest_difference(scores, arms("bf16").reference) < engines.EXACT
        assert greatest_difference(scores, arms("phase").reference) > engines.CONTROL


def test_no_arm_reads_short_prompts_precisely_unless_it_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a device's default is."""
    started: list[Any] = []
    monkeypatch.setattr(engine, "_start", lambda model, arm, options: started.append(options["hf_overrides"]))
    monkeypatch.setattr(engine, "VllmEngine", lambda *args, **kwargs: None)
    asked = {"mine": evaluated.Arm(name="mine", policy=Policy(prefill="nvfp4", min_prompt=9))}
    for arm in ("phase", "mine"):
        backend(folder, asked=asked).open(arm)
    assert [options["quantization_config"]["min_prompt"] for options in started] == [0, 9]


def test_the_control_is_the_reference_in_other_batches(arms: Callable[[str], Arm]) -> None:
    reference, control = arms("bf16"), arms(CONTROL)
    assert control.answers == reference.answers
    assert greatest_difference(control.reference, reference.reference) < engines.EXACT
    assert [list(places) for places in control.engine._batches(5)] == [[4, 3, 2], [1, 0]]
    assert [list(places) for places in reference.engine._batches(5)] == [[0, 1, 2, 3, 4]]
    assert [list(places) for places in control.engine._batches(1)] == [[0]]


@pytest.mark.parametrize(
    ("name", "prefill", "decode", "emulated"),
    [
        ("bf16", "vllm.fp32", "vllm.fp32", False),
        (CONTROL, "vllm.fp32", "vllm.fp32", False),
        ("phase", "emulation.nvfp4", "vllm.fp32", True),
        ("uniform", "emulation.nvfp4", "emulation.nvfp4", True),
        ("decode-only", "vllm.fp32", "emulation.nvfp4", True),
    ],
)
def test_kernels(arms: Callable[[str], Arm], name: str, prefill: str, decode: str, emulated: bool) -> None:
    engine = arms(name).engine
    assert engine.kernels == {"prefill": [prefill], "decode": [decode]}
    assert engine.emulated is emulated


def test_answers_end_with_the_end_of_turn_or_at_the_limit(arms: Callable[[str], Arm]) -> None:
    answers = arms("bf16").answers
    ended = [answer for answer in answers if END in answer]
    assert ended
    assert all(answer.index(END) == len(answer) - 1 for answer in ended)
    assert {len(answer) for answer in answers if END not in answer} == {LIMIT}


def test_ends_of_the_model_count_without_the_tokenizers(
    folder: Path, tmp_path: Path, arms: Callable[[str], Arm]
) -> None:
    """vLLM reads generation_config.json; here the end is what is the first token of an answer without it."""
    first = arms("bf16").answers[-1][0]
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "generation_config.json").write_text(f'{{"eos_token_id": [{first}]}}')
    with closing(start(model, "bf16", end=None)) as engine:
        assert engine.generate(QUERIES[-1:]) == [[first]]


def test_preempted_answers_are_scored_as_undisturbed_ones(folder: Path, arms: Callable[[str], Arm]) -> None:
    """Ten blocks hold the prompts but not their answers, and with eight rows a step a prompt comes in many parts."""
    expected = arms("phase").crowd
    crowded = {"num_gpu_blocks_override": 10, "max_model_len": 160, "max_num_batched_tokens": 8}
    with closing(start(folder, "phase", **crowded, disable_log_stats=False)) as engine:
        ours = engine.score(CROWD, CROWDS_ANSWERS)
        others = engine.score(CROWD, [answer[::-1] for answer in CROWDS_ANSWERS])
        preempted = {metric.name: metric for metric in engine.llm.get_metrics()}["vllm:num_preemptions"].value
    assert preempted > 0
    assert greatest_difference(ours, expected) < 1e-4
    assert greatest_difference(others, expected) > engines.CONTROL


def test_a_quantized_folder_brings_its_weights_and_names_the_reference(
    folder: Path, tmp_path: Path, arms: Callable[[str], Arm]
) -> None:
    quantized = write_quantized(folder, tmp_path / "quantized")
    name_decode_model(quantized, folder, {"prefill": "nvfp4"})
    assert backend(quantized).model == str(folder)
    reference, expected, control = map(arms, ("bf16", "phase", "uniform"))
    with closing(start(quantized, "phase")) as engine:
        scored = engine.score(QUERIES, reference.answers)
    assert greatest_difference(scored, expected.reference) == 0
    assert greatest_difference(scored, control.reference) > engines.CONTROL


def test_without_vllm_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"vLLM is not installed: pip install 'mixquant\[vllm\]'"):
        backend(folder)


@pytest.mark.parametrize(
    ("arm", "options", "words"),
    [
        ("phases", {}, "Unknown arm 'phases': did you mean phase"),
        ("bf16", {"max_model_len": 99999}, "cannot start .* in the arm bf16 .*max_model_len.*: choose a model and"),
        ("phase", {"kv_sharing_fast_prefill": True}, "^--kv-sharing-fast-prefill gives layers only a part .* without"),
        ("bf16", {"num_gpu_blocks_override": 1}, "cannot start .* in the arm bf16 .*: choose a model and options"),
    ],
)
def test_an_engine_that_cannot_start(folder: Path, arm: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        start(folder, arm, **options)
    assert "\n" not in str(raised.value)


def test_a_model_that_vllm_does_not_know(folder: Path, tmp_path: Path) -> None:
    config = (folder / "config.json").read_text().replace("Qwen3ForCausalLM", "Qwen3ForNobody")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(InputError, match=r"cannot start .*Qwen3ForNobody.*: choose a model and options"):
        start(tmp_path, "bf16")


def test_an_unknown_format_or_model_is_refused_before_anything_starts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Unknown prefill format 'nvfp5': did you mean nvfp4"):
        backend(folder, format="nvfp5")
    with pytest.raises(InputError, match="is not a folder"):
        backend(tmp_path / "none")


def test_what_does_not_fit_the_context_is_refused_and_the_engine_goes_on(folder: Path) -> None:
    prompt = list(range(3, 43))
    with closing(start(folder, "bf16", max_model_len=64)) as engine:
        with pytest.raises(
            InputError, match="40 prompt tokens and up to 25 new ones exceed vLLM's context of 64: leave"
        ):
            engine.generate([Query("", prompt, 25)])
        with pytest.raises(InputError, match="exceed vLLM's context of 64"):
            engine.score([Query("", prompt, 9)], [[5] * 25])
        assert len(engine.score([Query("", prompt, 9)], [[5] * 24])[0]) == 24
