"""Nested weights in real engines, in BF16, with the emulated kernel: where every row is decode, not one bit may differ
from stock vLLM.

Products of joined weights and vLLM's own are by the same oneDNN kernel here, so answers are compared for equality.
"""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixquant.integrations.vllm.linear import PhaseLinearMethod
from mixquant.kernels import layer
from mixquant.kernels.nested import NestedKernel
from tests.formats.inputs import same_bits
from tests.integrations.vllm.engines import (
    Answer,
    answers,
    assert_as_stock,
    linear_weights,
    prompts,
    running,
    tiny_model,
)
from tests.integrations.vllm.experts import qwen3_moe
from tests.integrations.vllm.refusals import refused
from tests.integrations.vllm.test_metrics import logged
from tests.kernels.native import Native

BF16 = {"dtype": "bfloat16"}
FP8 = {"prefill": "fp8", "tail": 1}
NESTED = FP8 | {"storage": "nested"}
AUTO = FP8 | {"storage": "auto"}
ALL_DECODE = {"tail": 999}
UNIFORM = {"decode": "fp8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in BF16."""
    path: Path = tmp_path_factory.mktemp("tiny-bf16")
    tiny_model().to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def said(folder: Path) -> Callable[..., list[Answer]]:
    """What an engine answers under a policy (None: stock vLLM); each is asked once."""

    @functools.cache
    def ask(*policy: tuple[str, Any]) -> list[Answer]:
        with running(folder, dict(policy) or None, **BF16) as llm:
            return answers(llm, prompts())

    return lambda policy: ask(*(policy or {}).items())


def joined(llm: Any) -> dict[str, Tensor]:
    """The weight that each linear layer of an engine decodes by."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    methods = {name: getattr(module, "quant_method", None) for name, module in model.named_modules()}
    routed = {name: m.routed for name, m in methods.items() if isinstance(m, PhaseLinearMethod)}
    assert all(isinstance(layer.decode, NestedKernel) for layer in routed.values())
    return {name: layer.decode.dense() for name, layer in routed.items()}


def checkpoint(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's linear layers as vLLM fuses them."""
    fused = {}
    for i in range(3):
        layer = f"model.layers.{i}"
        parts = {
            "self_attn.qkv_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "self_attn.o_proj": ["self_attn.o_proj"],
            "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down_proj": ["mlp.down_proj"],
        }
        for name, names in parts.items():
            fused[f"{layer}.{name}"] = torch.cat([state[f"{layer}.{part}.weight"] for part in names])
    return fused


def assert_weights(llm: Any, model: torch.nn.Module) -> None:
    found, expected = joined(llm), checkpoint(model.state_dict())
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], weight.to(torch.bfloat16)) for name, weight in expected.items())


def test_decode_is_stock_vllms_to_the_last_bit(said: Callable[..., list[Answer]]) -> None:
    assert_as_stock(said(NESTED | ALL_DECODE), said(None), said(NESTED), said(NESTED | UNIFORM))


def test_prompts_are_read_by_the_plane(said: Callable[..., list[Answer]]) -> None:
    """Without a tail a prompt's first token is chosen by the plane alone, as in the uniform arm."""
    phase, uniform, separate = (
        [answer.logprobs[0] for answer in said(policy)]
        for policy in (NESTED | {"tail": 0}, NESTED | UNIFORM, FP8 | UNIFORM)
    )
    assert phase == uniform
    assert phase != separate


def test_nvfp4_stands_beside_a_nested_weight(said: Callable[..., list[Answer]]) -> None:
    nvfp4 = NESTED | {"prefill": "nvfp4"}
    assert said(nvfp4) == said(nvfp4 | {"storage": "separate"})
    assert said(nvfp4) != said(NESTED)


def test_weights_are_the_checkpoints_after_load_generate_and_reload(folder: Path, tmp_path: Path) -> None:
    """The new weights have other escapes than the old ones; an engine that starts with them says the same."""
    other, generator = tiny_model().to(torch.bfloat16), torch.Generator().manual_seed(7)
    for parameter in other.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    other.save_pretrained(tmp_path)
    with running(folder, NESTED, **BF16) as llm:
        assert_weights(llm, tiny_model())
        before = answers(llm, prompts())
        assert_weights(llm, tiny_model())
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)})
        llm.reset_prefix_cache()
        assert_weights(llm, other)
        reloaded = answers(llm, prompts())
    with running(tmp_path, NESTED, **BF16) as llm:
        started = answers(llm, prompts())
    assert reloaded == started
    assert reloaded != before


@pytest.mark.parametrize(
    ("policy", "bits"),
    [(NESTED, 12), (NESTED | UNIFORM, 8), (NESTED | {"role": "prefill"}, 8), (FP8 | UNIFORM, 16)],
    ids=["nested", "nested-uniform", "nested-prefill", "uniform"],
)
def test_a_weight_that_nobody_multiplies_by_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, log: list[str], policy: dict[str, Any], bits: int
) -> None:
    """Where no phase is precise, the plane alone stays (of separate copies the emulation holds codes in BF16)."""
    weights = linear_weights(monkeypatch)
    with running(folder, policy, **BF16):
        gc.collect()
        assert [weight() for weight in weights] == [None] * 12
    (held,) = re.findall(r"\((\S+) bits a weight\)", "\n".join(log))
    assert bits <= float(held) < bits + 1  # and scales


def head(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model.lm_head


def test_the_output_head_nests_unless_it_is_the_embedding(folder: Path, tmp_path: Path, log: list[str]) -> None:
    """Answers of an engine whose head is nested are compared to stock vLLM's above."""
    with running(folder, NESTED, **BF16) as llm:
        assert same_bits(head(llm).quant_method.kernel.dense(), tiny_model().lm_head.weight.data.to(torch.bfloat16))
        assert head(llm).weight.numel() == 0
    assert re.search(r"output head nested too, which saves \d", "\n".join(log))
    with running(folder, NESTED | {"ignore": ["lm_head"]}, **BF16) as llm:
        assert head(llm).weight.numel() > 0
    tiny_model(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path)
    with running(tmp_path, NESTED, **BF16) as llm:
        assert head(llm).weight.numel() > 0


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return logged(monkeypatch)


def test_the_log_says_what_is_nested_and_what_that_saves(folder: Path, log: list[str]) -> None:
    with running(folder, NESTED, **BF16):
        pass
    assert "prefill emulation.fp8 (12 layers, emulated), decode emulation.nested (12 layers, emulated)" in log[1]
    assert log[2] == "storage: 12 of 12 layers nested"
    assert "quantization saves 0.2 MiB (12.4 bits a weight)" in log[3]


def test_auto_keeps_a_layer_with_too_many_escapes_separate_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """And refuses it where nesting is asked for."""
    model = tiny_model().to(torch.bfloat16)
    model.model.layers[1].mlp.down_proj.weight.data[:, 1:9] = 1.7e-8
    model.save_pretrained(tmp_path)
    name = r"model.layers.1.mlp.down_proj: 12\d of 4096 weights in 16 rows are too small"
    refused(rf"{name} .*: use storage=separate, or add the layer", tmp_path, NESTED, **BF16)
    monkeypatch.setattr(layer, "NESTED", (Native,))
    with running(tmp_path, AUTO | ALL_DECODE, **BF16) as llm:
        ours = answers(llm, prompts())
    with running(tmp_path, None, **BF16) as llm:
        assert_as_stock(ours, answers(llm, prompts()))
    said = f"11 of 12 layers nested, 1 keep separate weights for prefill and decode, first {name}"
    assert re.search(said, log[2])


def test_each_rank_nests_its_shard(folder: Path, said: Callable[..., list[Answer]]) -> None:
    made = []
    for policy in (NESTED | ALL_DECODE, None):
        with running(folder, policy, **BF16, tensor_parallel_size=2) as llm:
            made.append(answers(llm, prompts()))
    assert_as_stock(made[0], made[1], said(NESTED))


@pytest.mark.parametrize(
    ("policy", "options", "words"),
    [
        (NESTED | {"prefill": "int8"}, BF16, r"storage=nested is one weight for FP8 and BF16, .*storage=separate"),
        (NESTED, {}, r"only bfloat16 weights nest, not torch.float32.*: use storage=separate"),
    ],
)
def test_refused(folder: Path, policy: dict[str, Any], options: dict[str, Any], words: str) -> None:
    refused(words, folder, policy, **options)


def test_a_broken_weight_names_its_layer(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path)
    refused(r"model\.layers\.2\.mlp\.down_proj: .*1 NaN or Inf", tmp_path, NESTED, **BF16)


def test_a_shape_that_does_not_nest(tmp_path: Path) -> None:
    tiny_model(intermediate_size=288).to(torch.bfloat16).save_pretrained(tmp_path)
    words = r"mlp.down_proj of shape \[128, 288\]: nested weights need N .*: use storage=separate, or add"
    refused(words, tmp_path, NESTED, **BF16)


def test_experts_do_not_nest_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """Where nesting is asked for they are refused."""
    qwen3_moe().to(torch.bfloat16).save_pretrained(tmp_path)
    refused(r'experts do not nest: use storage=auto, or add "\*\.experts" to `ignore`', tmp_path, NESTED, **BF16)
    monkeypatch.setattr(layer, "NESTED", (Native,))
    with running(tmp_path, AUTO, **BF16):
        pass
    said = r"4 of 6 layers nested, 2 keep separate .*, first model.layers.0.mlp.experts.*: experts do not nest"
    assert re.search(said, log[2])
