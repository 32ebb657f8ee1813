"""The independent reference of a run: `tests.integrations.transformers.reference.TwoModels` on the same prompts.

It computes in float64, one prompt at a time, and shares nothing with the plugin but the number formats. What each of
its quantized layers is given is kept, under vLLM's names, for the trace of a difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixquant.formats import nvfp4, scales
from tests.integrations.transformers.reference import TwoModels
from tests.integrations.vllm.engines import Answer
from tests.integrations.vllm.recording import LayerInputs
from tests.integrations.vllm.scenarios import Run, Scenario

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""vLLM's fused layers and their parts."""

WATCHED = {"q_proj": "qkv_proj", "o_proj": "o_proj", "gate_proj": "gate_up_proj", "down_proj": "down_proj"}
"""Layers whose input is kept, and vLLM's names for them."""


@dataclass(frozen=True)
class ReferenceRun(Run):
    """What the reference says to the tokens of a run."""

    recorded: dict[int, LayerInputs] = field(default_factory=dict)

    def layer_inputs(self, length: int) -> LayerInputs:
        return self.recorded.get(length, {})


def two_models(plain: PreTrainedModel) -> TwoModels:
    """The reference for NVFP4: vLLM quantizes fused layers as one matrix, so their parts share a global scale."""
    models = TwoModels.of(plain)
    for name, block in models.reader.named_modules():
        for parts in FUSED.values():
            if all(isinstance(getattr(block, part, None), nn.Module) for part in parts):
                weights = [plain.get_submodule(f"{name}.{part}").weight.detach() for part in parts]
                amax = nvfp4.largest_magnitude(torch.cat(weights))
                for part, weight in zip(parts, weights, strict=True):
                    quantized = nvfp4.quantize_weight(weight, scales.search, amax)
                    getattr(block, part).weight = quantized.dequantize().double()
    return models


def judge(models: TwoModels, run: Run) -> ReferenceRun:
    """The reference's tokens, and its log-probabilities of the run's tokens."""
    scenario, recorded, given = run.scenario, {}, []
    for prompt, theirs in zip(scenario.prompts, run.answers, strict=True):
        with _recorded(models.reader, len(prompt)) as inputs:
            given.append(_judge(models, scenario, torch.tensor(prompt), torch.tensor(theirs.tokens)))
        recorded[len(prompt)] = inputs
    return ReferenceRun(scenario, given, recorded=recorded)


def _judge(models: TwoModels, scenario: Scenario, prompt: Tensor, tokens: Tensor) -> Answer:
    scores = models.score(prompt, tokens, scenario.tail)
    about_prompt = prompt_scores(models, prompt, scenario.tail) if scenario.prompt_logprobs else []
    return Answer(scores.argmax(-1).tolist(), pick(scores, tokens), about_prompt)


@torch.no_grad()
def prompt_scores(models: TwoModels, prompt: Tensor, tail: int) -> list[float]:
    """Log-probability of each prompt token but the first."""
    cache, split = models.new_cache(), max(len(prompt) - tail, 0)
    parts = ((models.reader, prompt[:split]), (models.writer, prompt[split:]))
    logits = [model(part[None], past_key_values=cache).logits[0] for model, part in parts if len(part)]
    return pick(torch.cat(logits)[:-1].log_softmax(-1), prompt[1:])


def pick(scores: Tensor, tokens: Tensor) -> list[float]:
    """One score a row: [tokens, vocabulary], [tokens] -> [tokens]."""
    return scores.gather(1, tokens[:, None])[:, 0].tolist()


@contextmanager
def _recorded(model: nn.Module, length: int) -> Iterator[LayerInputs]:
    """The inputs [length, K] of the model's quantized layers, NaN where another model reads."""
    inputs: LayerInputs = {}

    def watch(name: str) -> object:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0][0]
            inputs[name] = nn.functional.pad(rows, (0, 0, 0, length - len(rows)), value=torch.nan)

        return hook

    names = [(name, *name.rpartition(".")[::2]) for name, _ in model.named_modules()]
    handles = [
        model.get_submodule(name).register_forward_pre_hook(watch(f"{parent}.{WATCHED[last]}"))
        for name, parent, last in names
        if last in WATCHED
    ]
    yield inputs
    for handle in handles:
        handle.remove()
