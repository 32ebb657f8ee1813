"""Mixtures of experts of other families: GLM 4.5's, DeepSeek's beside latent attention (MLA), and gpt-oss's.

Latent attention multiplies by `kv_b_proj` what no plan knows: gathered rows of the cache while a later chunk of a
prompt is read, and in a step that also decodes, the rows of prompts alone; what decodes has absorbed its weight. So
that layer stays BF16 in both phases (`layers.NEVER`).
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.models.deepseek_v2 import DeepSeekV2FusedQkvAProjLinear
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.integrations.vllm import experts, scenarios
from tests.integrations.vllm.moe_reference import check_reference
from tests.integrations.vllm.refusals import refused
from tests.integrations.vllm.scenarios import CROWDED, PHASE, Run, Scenario

PRECISION = {"compilation_config": {"custom_ops": ["none"]}}
"""With torch's rotary embedding: under `enforce_eager` vLLM takes a C++ one, by which the answers of stock DeepSeek
models depend on the batch."""

TOGETHER = Scenario(precision=PRECISION)


@pytest.fixture(scope="module", params=["glm4_moe", "deepseek_v2", "deepseek_v3"])
def family(request: pytest.FixtureRequest) -> str:
    """The name of a family."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the family's tiny model."""
    path = tmp_path_factory.mktemp(family)
    getattr(experts, family)().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(family: str, folder: Path) -> Callable[[Scenario], Run]:
    """The run of a scenario on the family's tiny model; each is made once."""
    return functools.cache(functools.partial(serve if family.startswith("deepseek") else scenarios.run, folder))


def serve(folder: Path, scenario: Scenario) -> Run:
    """The run of a scenario by latent attention in chunks and on cached prefixes.

    On CPUs vLLM allows both where there is AMX. Its reference kernel, which it takes elsewhere, can do both too.
    """
    backend = AttentionBackendEnum.CPU_MLA.get_path()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        patch.setattr(CpuPlatform, "get_attn_backend_cls", classmethod(lambda *args, **kwargs: backend))
        return scenarios.run(folder, scenario)


def test_together(check_scenario):
    """Concurrent requests in chunks on cached prefixes, with shared experts and routers that choose among groups"""
    ours = check_scenario(TOGETHER)
    assert ours.cached_tokens
    assert any(0 < computed < length for length, computed, _ in ours.chunks)


def test_transformers_reference(run, family):
    """The same against Transformers"""
    check_reference(run(TOGETHER), getattr(experts, family)())


@pytest.mark.parametrize("family", ["deepseek_v3"], indirect=True)
def test_compiled(run, check):
    """The same under torch.compile, which must not let a router run before its own product"""
    compiled = replace(TOGETHER, options={"enforce_eager": False})
    check(run(compiled), run(TOGETHER.simplest), *map(run, TOGETHER.controls))


@pytest.mark.parametrize("family", ["deepseek_v2"], indirect=True)
def test_latent_attention_multiplies_other_rows(folder, monkeypatch):
    """Why `kv_b_proj` has no copy: some of its calls get other rows than the step's, and none is the plugin's"""
    given, multiply = set(), UnquantizedLinearMethod.apply

    def watched(self: UnquantizedLinearMethod, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if layer.prefix.endswith("kv_b_proj"):
            given.add(len(x))
        return multiply(self, layer, x, bias)

    monkeypatch.setattr(UnquantizedLinearMethod, "apply", watched)
    steps = serve(folder, TOGETHER).steps
    assert given - {sum(step.scheduled) for step in steps}
    assert not any("kv_b_proj" in layer for step in steps for layer in step.inputs)


@pytest.mark.parametrize("family", ["deepseek_v2"], indirect=True)
def test_preemption(check_scenario):
    """Preempted requests computed again, in chunks that hold prompt and answer, by latent attention"""
    ours = check_scenario(replace(CROWDED, new_tokens=32, precision=PRECISION))
    assert any(computed < length < computed + scheduled - 1 for length, computed, scheduled in ours.chunks)


@pytest.mark.parametrize("family", ["deepseek_v3"], indirect=True)
def test_projection_with_a_kernel_of_its_own(folder, run, monkeypatch):
    """On Hopper and Blackwell vLLM multiplies by the weight of DeepSeek V3's first projection, past its method"""
    create = DeepSeekV2FusedQkvAProjLinear.__init__

    def as_on_hopper(self: DeepSeekV2FusedQkvAProjLinear, *args: object, **kwargs: object) -> None:
        create(self, *args, **kwargs)
        self._use_min_latency_gemm = True

    monkeypatch.setattr(DeepSeekV2FusedQkvAProjLinear, "__init__", as_on_hopper)
    assert serve(folder, TOGETHER).answers == run(TOGETHER).answers


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny gpt-oss in float32."""
    path = tmp_path_factory.mktemp("gpt-oss")
    experts.gpt_oss().save_pretrained(path)
    return path


def test_gpt_oss_without_its_experts(gpt_oss, check):
    """gpt-oss with its experts in BF16: attention with sinks and windows is quantized"""
    ours = Scenario(PHASE | {"ignore": ["*.experts"]})
    check(*(scenarios.run(gpt_oss, one) for one in (ours, ours.simplest, *ours.controls)))


def test_gpt_oss_refused(gpt_oss, tmp_path):
    """Its experts, which have biases, and its published checkpoint, which has no BF16 side"""
    refused(r'Experts with biases.* swigluoai cannot be quantized: add "\*\.experts" to `ignore`', gpt_oss, PHASE)
    config = json.loads((gpt_oss / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    published = shutil.copytree(gpt_oss, tmp_path / "published")
    (published / "config.json").write_text(json.dumps(config))
    refused(r"published is already quantized by mxfp4: use the BF16 model\. ", published, PHASE)
