"""Mixtures of experts: the routed experts of Qwen3-MoE, and the shared ones of Qwen2-MoE beside them.

The reference is Transformers' model with every expert fake-quantized, alone and token by token. Its codes may flip
inside an expert, where no trace looks: so one request of eight may differ, and all others must be equal.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixquant.errors import InputError
from tests.integrations.transformers.reference import FORMATS, TwoModels
from tests.integrations.vllm import reference, scenarios
from tests.integrations.vllm.engines import CONTROL, EXACT, Answer, greatest_difference, running
from tests.integrations.vllm.experts import qwen2_moe, qwen3_moe
from tests.integrations.vllm.scenarios import PHASE, TOGETHER, Run, Scenario


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the tiny Qwen3-MoE."""
    path = tmp_path_factory.mktemp("tiny-qwen3-moe")
    qwen3_moe().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Callable[[Scenario], Run]:
    """The run of a scenario on the tiny Qwen3-MoE; each is made once."""
    return functools.cache(functools.partial(scenarios.run, folder))


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "int8"])
def test_together(check_scenario, format):
    """Concurrent requests in chunks on cached prefixes"""
    check_scenario(Scenario(PHASE | {"prefill": format}))


def test_compiled(check_scenario):
    """The same under torch.compile, which sees one opaque operation"""
    check_scenario(Scenario(options={"enforce_eager": False}))


@pytest.mark.slow
def test_tensor_parallel(check_scenario):
    """Two tensor-parallel workers, each with half of every expert"""
    check_scenario(Scenario(options={"tensor_parallel_size": 2}))


def test_decode_only(run, check):
    """Experts quantized for the answer alone are neither the phase's nor plain"""
    opposite = Scenario(PHASE | {"prefill": "bf16", "decode": "nvfp4"})
    check(run(opposite), run(opposite.simplest), run(TOGETHER), run(TOGETHER.controls[1]))


class FakeQuantExperts(nn.Module):
    """Transformers' experts with weights and inputs that have gone through a format and back, one expert at a time."""

    def __init__(self, experts: nn.Module, format: str) -> None:
        super().__init__()
        self.activations, weights = FORMATS[format]
        self.gate_up = [weights(weight.detach()) for weight in experts.gate_up_proj]
        self.down = [weights(weight.detach()) for weight in experts.down_proj]

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [rows, H]; ids and weights [rows, experts per token] -> [rows, H]."""
        out = torch.zeros_like(x)
        for expert in ids.unique():
            rows, choice = (ids == expert).nonzero(as_tuple=True)
            gate, up = (self.activations(x[rows]) @ self.gate_up[expert].T).chunk(2, -1)
            hidden = self.activations(nn.functional.silu(gate) * up)
            out[rows] += weights[rows, choice, None] * (hidden @ self.down[expert].T)
        return out


def two_models(model: PreTrainedModel, format: str = "nvfp4") -> TwoModels:
    """The reference; routers and the gates of shared experts stay as they are."""
    models = reference.two_models(model)
    for name, layer in list(models.reader.named_modules()):
        block = models.reader.get_submodule(name.rpartition(".")[0])
        if name.endswith(".experts"):
            block.experts = FakeQuantExperts(layer, format)
        elif name.endswith(".shared_expert_gate"):
            block.shared_expert_gate = model.get_submodule(name)
    return models


def judge(models: TwoModels, run: Run) -> list[Answer]:
    """The reference's tokens, and its log-probabilities of the run's tokens."""
    answers = []
    for prompt, answer in zip(run.scenario.prompts, run.answers, strict=True):
        tokens = torch.tensor(answer.tokens)
        scores = models.score(torch.tensor(prompt), tokens)
        answers.append(Answer(scores.argmax(-1).tolist(), reference.pick(scores, tokens)))
    return answers


def test_transformers_reference(run):
    """Routed experts against Transformers"""
    check_reference(run(TOGETHER), qwen3_moe())


def test_transformers_reference_with_shared_experts(tmp_path):
    """Routed experts, and shared ones beside them, against Transformers"""
    qwen2_moe().save_pretrained(tmp_path)
    check_reference(scenarios.run(tmp_path, TOGETHER), qwen2_moe())


def check_reference(ours: Run, model: PreTrainedModel) -> None:
    models = two_models(model.double())
    pairs = list(zip(ours.answers, judge(models, ours), strict=True))
    equal = [one.tokens == other.tokens and greatest_difference(one, other) < EXACT for one, other in pairs]
    assert equal.count(False) <= len(pairs) // 8, [greatest_difference(*pair) for pair in pairs]
    for control in models.controls:
        assert max(map(greatest_difference, ours.answers, judge(control, ours))) > CONTROL


def test_startup_log(folder, caplog):
    """The kernels and the memory bill count every set of experts as one layer"""
    logger = logging.getLogger("vllm.mixquant")
    logger.addHandler(caplog.handler)
    caplog.set_level("INFO", logger.name)
    with running(folder, PHASE):
        pass
    logger.removeHandler(caplog.handler)
    assert "prefill emulation.nvfp4 (6 layers, emulated), decode vLLM FP32 (6 layers)" in caplog.text
    linear, experts = 256 * 128 + 128 * 128, 8 * (128 * 128 + 128 * 64)  # weights in each of two layers
    assert f"quantization adds {2 * (linear + experts) * 4 / 2**20:.1f} MiB" in caplog.text


def test_ignored_experts(run, check):
    """Experts that `ignore` names stay vLLM's own: the rest of the model alone is quantized"""
    ignored = Scenario(PHASE | {"ignore": ["*.experts"]})
    check(run(ignored), run(ignored.simplest), run(TOGETHER), run(TOGETHER.controls[1]))


@pytest.mark.parametrize(
    ("policy", "options", "remedy"),
    [
        ({}, {"enable_expert_parallel": True}, "without expert, data and context parallelism"),
        ({}, {"enable_lora": True}, "without --enable-lora"),
        ({"native": True, "ignore": ["*_proj"]}, {}, "choose another format, or allow emulation"),
    ],
)
def test_refused(folder, policy, options, remedy):
    """What experts cannot follow is refused in one sentence"""
    with pytest.raises(InputError, match=remedy), running(folder, PHASE | policy, **options):
        pass
