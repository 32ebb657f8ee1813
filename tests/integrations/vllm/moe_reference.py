"""The reference of mixtures of experts: Transformers' model with every expert fake-quantized, alone and token by token.

Its codes may flip inside an expert, where no trace looks: so one request of eight may differ, and all others must be
equal.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.integrations.transformers.reference import FORMATS, TwoModels
from tests.integrations.vllm import reference
from tests.integrations.vllm.engines import CONTROL, EXACT, Answer, greatest_difference
from tests.integrations.vllm.scenarios import Run


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
    """The reference; routers, the gates of shared experts and what MLA absorbs stay as they are."""
    models = reference.two_models(model)
    for name, layer in list(models.reader.named_modules()):
        block = models.reader.get_submodule(name.rpartition(".")[0])
        if name.endswith(".experts"):
            block.experts = FakeQuantExperts(layer, format)
        elif name.endswith((".shared_expert_gate", ".kv_b_proj")):
            setattr(block, name.rpartition(".")[2], model.get_submodule(name))
    return models


def judge(models: TwoModels, run: Run) -> list[Answer]:
    """The reference's tokens, and its log-probabilities of the run's tokens."""
    answers = []
    for prompt, answer in zip(run.scenario.prompts, run.answers, strict=True):
        tokens = torch.tensor(answer.tokens)
        scores = models.score(torch.tensor(prompt), tokens)
        answers.append(Answer(scores.argmax(-1).tolist(), reference.pick(scores, tokens)))
    return answers


def check_reference(ours: Run, model: PreTrainedModel) -> None:
    models = two_models(model.double())
    pairs = list(zip(ours.answers, judge(models, ours), strict=True))
    equal = [one.tokens == other.tokens and greatest_difference(one, other) < EXACT for one, other in pairs]
    assert equal.count(False) <= len(pairs) // 8, [greatest_difference(*pair) for pair in pairs]
    for control in models.controls:
        assert max(map(greatest_difference, ours.answers, judge(control, ours))) > CONTROL
