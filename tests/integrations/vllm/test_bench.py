"""What a benchmarked engine tells of itself, on real engines of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoModelForCausalLM

from mixquant.bench.arms import chosen
from mixquant.bench.memory import Sizes
from mixquant.checkpoint.locate import find
from mixquant.integrations.vllm import bench, rates
from tests.folders import name_decode_model, write_quantized
from tests.integrations.vllm import engines
from tests.integrations.vllm.experts import qwen3_moe

EXTENSION = f"{bench.__name__}.{bench.Bench.__name__}"


@contextmanager
def runner(folder: Path, policy: Mapping[str, Any] | None) -> Iterator[Any]:
    with engines.running(folder, policy, worker_extension_cls=EXTENSION) as llm:
        yield llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def test_the_shape_is_the_models(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and "head" not in name}
    config = model.config
    with runner(folder, None) as stock:
        shape = rates.shape(stock)
    assert shape is not None
    assert shape.linear == sum(each.weight.numel() for each in linears.values())
    assert shape.head == model.lm_head.weight.numel()
    assert shape.layers == config.num_hidden_layers
    assert shape.attention == config.num_attention_heads * config.head_dim
    assert shape.cache == 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def test_experts_have_no_shape(tmp_path: Path) -> None:
    qwen3_moe().save_pretrained(tmp_path)
    with runner(tmp_path, None) as experts:
        assert rates.shape(experts) is None


def test_kernels_are_the_plugins_own_answer(folder: Path) -> None:
    with engines.running(folder, {"prefill": "nvfp4", "tail": 3}, worker_extension_cls=EXTENSION) as llm:
        (facts,) = llm.collective_rpc("mixquant_facts")
        assert facts["kernels"] == {"prefill": ["emulation.nvfp4"], "decode": ["vllm.fp32"]}
        assert facts["emulated"]
        assert llm.collective_rpc("mixquant_rates", args=([64],)) == [{}]  # a CPU has no ceilings
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        state = worker.model_runner.vllm_config.quant_config.state
        assert state.tail == 3
        llm.collective_rpc("mixquant_set_tail", args=(16,))
        assert state.tail == 16


def test_a_quantized_folder_is_for_policies_in_its_format(folder: Path, tmp_path: Path) -> None:
    quantized = write_quantized(folder, tmp_path / "quantized")
    name_decode_model(quantized, folder, {"prefill": "nvfp4"})
    sizes = Sizes(weights=1, token=1, tokens=1, device="cpu")
    backend = bench.VllmBackend(
        found=find(quantized), window=64, sizes=sizes, total=0, lengths=(), vocabulary=64, load_format="dummy"
    )
    weights = {}
    for arm in chosen(["bf16", "phase", "uniform"], ["other=int8", "mine=nvfp4,weights=elsewhere"], "nvfp4"):
        overrides = backend._options(arm.spec).get("hf_overrides", {})
        weights[arm.name] = overrides.get("quantization_config", {}).get("prefill_weights")
    own = str(quantized)
    assert weights == {"bf16": None, "phase": own, "uniform": own, "other": None, "mine": "elsewhere"}


@pytest.mark.parametrize("tail", [0, 16])
def test_a_switched_tail_is_the_tail_of_an_engine_that_starts_with_it(folder: Path, tail: int) -> None:
    """And none named is the engine's own again"""
    prompts = engines.prompts()[3:6]
    with engines.running(folder, {"prefill": "nvfp4", "tail": tail}) as llm:
        expected = engines.answers(llm, prompts)
    with engines.running(folder, {"prefill": "nvfp4", "tail": 1}, worker_extension_cls=EXTENSION) as llm:
        default = engines.answers(llm, prompts)
        llm.reset_prefix_cache()
        llm.collective_rpc("mixquant_set_tail", args=(tail,))
        switched = engines.answers(llm, prompts)
        llm.reset_prefix_cache()
        llm.collective_rpc("mixquant_set_tail", args=(None,))
        again = engines.answers(llm, prompts)
    assert max(map(engines.greatest_difference, switched, expected)) < engines.EXACT
    assert max(map(engines.greatest_difference, again, default)) < engines.EXACT
    assert max(map(engines.greatest_difference, default, expected)) > engines.CONTROL
