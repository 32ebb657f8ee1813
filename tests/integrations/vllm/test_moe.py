"""Mixtures of experts: the routed experts of Qwen3-MoE, and the shared ones of Qwen2-MoE beside them.

`test_moe_families.py` has those of other families.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from mixquant.checkpoint.sidecar import Sidecar, write_sidecar
from mixquant.errors import InputError
from mixquant.integrations.vllm.moe_defaults import routes
from mixquant.policy import TAIL, Policy
from tests.integrations.vllm import scenarios
from tests.integrations.vllm.engines import engine_config, running, tiny_model
from tests.integrations.vllm.experts import deepseek_v2, deepseek_v3, glm4_moe, qwen2_moe, qwen3_moe
from tests.integrations.vllm.moe_reference import check_reference
from tests.integrations.vllm.scenarios import PHASE, TOGETHER, Run, Scenario

FLAG = {"quantization": "mixquant"}


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


def test_transformers_reference(run):
    """Routed experts against Transformers"""
    check_reference(run(TOGETHER), qwen3_moe())


def test_transformers_reference_with_shared_experts(tmp_path):
    """Routed experts, and shared ones beside them, against Transformers"""
    qwen2_moe().save_pretrained(tmp_path)
    check_reference(scenarios.run(tmp_path, TOGETHER), qwen2_moe())


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


@pytest.mark.parametrize(
    ("asked", "tail"),
    [
        (None, 1),
        ({"prefill": "nvfp4"}, 1),
        ({"prefill": "nvfp4", "tail": 32}, 32),
        ({"prefill": "nvfp4", "ignore": ["*.experts"]}, 32),  # the rest is dense
        ({"prefill": "fp8", "decode": "fp8"}, 32),  # one product, for which a tail means nothing
    ],
)
def test_the_default_tail(folder, asked, tail):
    """One precise row reads few experts, 32 nearly all: without a word the tail is 1 where experts are quantized"""
    assert engine_config(folder, asked, **FLAG).quant_config.policy.tail == tail


def test_a_tail_beside_the_model_counts(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    write_sidecar(tmp_path / "model", Sidecar(Policy(prefill="nvfp4", tail=3)))
    assert engine_config(tmp_path / "model", None, **FLAG).quant_config.policy.tail == 3


def test_the_default_tail_of_a_dense_model(tmp_path):
    """Control"""
    tiny_model().save_pretrained(tmp_path)
    assert engine_config(tmp_path, None, **FLAG).quant_config.policy.tail == TAIL == 32


@pytest.mark.parametrize("family", [qwen2_moe, glm4_moe, deepseek_v2, deepseek_v3])
def test_every_family_is_known_to_route(family):
    config = family().config
    assert routes(config, Policy(prefill="nvfp4"))
    assert not routes(config, Policy(prefill="nvfp4", role="prefill"))
    assert not routes(tiny_model().config, Policy(prefill="nvfp4"))


@pytest.mark.parametrize(
    ("ignore", "routed"),
    [
        (["*.experts"], False),
        (["*.block_sparse_moe.experts"], False),
        (["re:language_model.*experts"], False),
        (["model.layers.0.*"], True),  # the others route
        (["*.o_proj"], True),
    ],
)
def test_who_ignores_all_experts_has_a_dense_model(ignore, routed):
    assert routes(qwen3_moe().config, Policy(prefill="nvfp4", ignore=ignore)) is routed


def test_a_configuration_that_only_could_have_experts_has_none():
    """One expert, and Nemotron-H's number of those that no layer has"""
    one = transformers.JambaConfig(num_experts=1)
    dense = transformers.NemotronHConfig(hybrid_override_pattern="M-M*")
    assert dense.n_routed_experts > 1
    assert not routes(one, Policy(prefill="nvfp4"))
    assert not routes(dense, Policy(prefill="nvfp4"))
    assert routes(transformers.JambaConfig(num_experts=16), Policy(prefill="nvfp4"))


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
