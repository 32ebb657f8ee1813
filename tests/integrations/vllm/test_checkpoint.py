"""Prefill weights from a quantized folder: against an engine that quantizes at load, and against stock vLLM.

What the folder holds is what quantizing at load makes, so the two must be equal to the last bit. Stock vLLM, which
reads the folder as a uniform model, vouches for tensors that we would never make: globals that are no powers of two.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.utils.torch_utils import get_kv_cache_quant_algo_string

from mixquant.checkpoint.sidecar import SIDECAR, Sidecar, write_sidecar
from mixquant.policy import Policy
from tests.folders import name_decode_model, write_quantized
from tests.integrations.vllm import scenarios
from tests.integrations.vllm.engines import engine_config, tiny_model
from tests.integrations.vllm.experts import qwen3_moe
from tests.integrations.vllm.refusals import refused
from tests.integrations.vllm.scenarios import NGRAM, PHASE, TOGETHER, Scenario

UNIFORM = {"prefill": "nvfp4", "decode": "nvfp4"}
FLAG = {"quantization": "mixquant"}


@pytest.fixture(scope="session")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny model's quantized folders, by the arguments of `write_quantized`."""

    @functools.cache
    def write(**arguments: Any) -> Path:
        return write_quantized(folder, tmp_path_factory.mktemp("quantized") / "model", **arguments)

    return write


def beside(folder: Path, **policy: Any) -> Scenario:
    """The tiny BF16 model with prefill weights from `folder`; without a format in the policy, the folder's."""
    return Scenario({"prefill_weights": str(folder), "tail": 1, **policy})


@pytest.mark.parametrize("tool", ["compressed-tensors", "modelopt"])
def test_folder_beside_the_model(run, check, quantized, tool):
    """NVFP4 prefill weights read from a folder, against quantizing at load (bit-equal)"""
    check(run(beside(quantized(tool=tool))), run(TOGETHER), run(beside(quantized(scales="amax"))), exact=0.0)


@pytest.mark.parametrize(
    ("tool", "asked"),
    [
        pytest.param("compressed-tensors", Scenario(None, FLAG), id="flag-compressed-tensors"),
        pytest.param("modelopt", Scenario({}), id="overrides-modelopt"),
    ],
)
def test_folder_as_the_model(run, check, quantized, folder, tool, asked, tmp_path):
    """A quantized folder served by its mixquant.json, against quantizing at load (bit-equal)"""
    ours = scenarios.run(serve(folder, tmp_path, tool), asked)
    check(ours, run(TOGETHER), run(beside(quantized(scales="amax"))), exact=0.0)


def test_layers_that_the_folder_left_alone(run, check, quantized):
    """A folder that quantizes all but o_proj, against `ignore` (bit-equal)"""
    ignored = run(Scenario(PHASE | {"ignore": ["*.o_proj"]}))
    check(run(beside(quantized(ignore=("o_proj",)))), ignored, run(TOGETHER), exact=0.0)


@pytest.mark.slow
def test_tensor_parallel_folder(run, check, quantized):
    """Prefill weights from a folder sharded over two workers, against one worker"""
    ours = Scenario(beside(quantized()).policy, {"tensor_parallel_size": 2})
    check(run(ours), run(beside(quantized())), run(beside(quantized(scales="amax"))))


def odd_globals(name: str, amax: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' own rule: 448 * 6 / amax, which is no power of two."""
    return 448 * 6 / amax


def test_stock_vllm_reads_the_same_folder(run, check, quantized, stock_nvfp4):
    """Both phases from a folder of another tool, against stock vLLM serving it without the plugin"""
    foreign = quantized(global_scale=odd_globals, activation=5.0)
    stock = scenarios.run(foreign, Scenario(None))
    check(run(beside(foreign, **UNIFORM)), stock, run(beside(quantized(scales="amax"), **UNIFORM)))


def test_quantized_by_others(quantized):
    refused("already quantized by compressed-tensors: use the BF16 model", quantized(), None, quantization="mixquant")
    refused("already quantized by compressed-tensors: use the BF16 model", quantized(), PHASE)


def test_another_decode_model(served, tmp_path):
    other = tmp_path / "other"
    tiny_model(num_hidden_layers=2).save_pretrained(other)
    refused("is not the BF16 model that the quantized weights belong to", other, {"prefill_weights": str(served)})


def test_weights_of_another_model(quantized, tmp_path):
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.neg_()
    other.save_pretrained(tmp_path)
    refused("layers.1.self_attn.qkv_proj: its weight .* not a quantized copy", tmp_path, beside(quantized()).policy)


def test_layers_that_the_folder_lacks(quantized, tmp_path):
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path)
    refused("has no layer model.layers.3.self_attn.q_proj", tmp_path, beside(quantized()).policy)


def test_fused_layers_must_share_their_scales(quantized, folder):
    def differ(name: str, amax: torch.Tensor) -> torch.Tensor:
        return torch.tensor(64.0 if "q_proj" in name else 32.0)

    refused(
        "qkv_proj: its fused parts have different global scales", folder, beside(quantized(global_scale=differ)).policy
    )
    refused("qkv_proj is fused of layers .* bf16 and nvfp4", folder, beside(quantized(ignore=("q_proj",))).policy)


def test_another_format_than_the_folder_holds(quantized, folder):
    refused("holds nvfp4 and the policy asks for fp8", folder, beside(quantized(), prefill="fp8").policy)


def test_a_folder_that_is_not_quantized(folder):
    refused("holds no quantized layer", folder, beside(folder).policy)


def test_experts_have_no_folder(quantized, tmp_path):
    qwen3_moe().save_pretrained(tmp_path)
    refused("experts are quantized at load only", tmp_path, beside(quantized()).policy)


def test_the_kv_cache_stays_the_decode_models(folder, tmp_path):
    """ModelOpt folders ask for an FP8 cache; it belongs to the BF16 model, which does not."""
    served = serve(folder, tmp_path, "modelopt")
    asked = json.loads((served / "config.json").read_text())["quantization_config"]
    assert str(get_kv_cache_quant_algo_string(asked)).startswith("fp8")  # control: vLLM's own reading of the folder
    assert engine_config(served, None, **FLAG).cache_config.cache_dtype == "auto"


def serve(folder: Path, tmp_path: Path, tool: str = "compressed-tensors") -> Path:
    """A quantized folder that names its BF16 model."""
    path = write_quantized(folder, tmp_path / "served", tool=tool)
    name_decode_model(path, folder, PHASE)
    return path


@pytest.fixture
def served(folder: Path, tmp_path: Path) -> Path:
    """A folder as our quantizer leaves it."""
    return serve(folder, tmp_path)


@pytest.mark.slow
def test_folder_with_drafts_by_look_up(run, check, quantized, served):
    """Drafts by n-gram look-up beside a folder served by its mixquant.json, against the same quantized at load"""
    ours = scenarios.run(served, Scenario(None, {**NGRAM.options, "quantization": "mixquant"}))
    check(ours, run(NGRAM), run(beside(quantized(scales="amax"))), exact=0.0)


def test_a_draft_cannot_read_the_folder(served):
    drafting = {"method": "draft_model", "model": str(served), "num_speculative_tokens": 2}
    options = {"quantization": "mixquant", "speculative_config": drafting}
    refused("The draft would read its weights from the quantized folder", served, None, **options)


def test_modelopt_settings_in_a_file_of_their_own(run, check, quantized, folder, tmp_path):
    """A ModelOpt folder whose config.json says nothing, against quantizing at load (bit-equal)"""
    served = serve(folder, tmp_path, "modelopt")
    config = json.loads((served / "config.json").read_text())
    config.pop("quantization_config")
    (served / "config.json").write_text(json.dumps(config))
    settings = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    producer = {"name": "modelopt", "version": "0.47.0"}
    (served / "hf_quant_config.json").write_text(json.dumps({"producer": producer, "quantization": settings}))
    ours = scenarios.run(served, Scenario(None, {"quantization": "mixquant"}))
    check(ours, run(TOGETHER), run(beside(quantized(scales="amax"))), exact=0.0)


def test_a_damaged_sidecar(served):
    (served / SIDECAR).write_text("{")
    refused("mixquant.json is not valid JSON", served, None, quantization="mixquant")


def test_a_policy_beside_a_plain_model(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    write_sidecar(tmp_path, Sidecar(Policy(prefill="nvfp4", tail=3)))
    assert engine_config(tmp_path, None, **FLAG).quant_config.policy.tail == 3
    assert engine_config(tmp_path, PHASE).quant_config.policy.tail == 1  # what is asked for counts more
