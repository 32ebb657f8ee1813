"""What the plugin refuses: one sentence, with the remedy, before any prompt is read."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.layers import quantization
from vllm.sampling_params import BeamSearchParams

from mixquant.errors import InputError
from mixquant.integrations.vllm import METHOD, register
from mixquant.integrations.vllm.checks import check_engine, check_version
from mixquant.integrations.vllm.config import PhaseConfig
from tests.integrations.vllm.engines import engine, engine_config, running, tiny_model
from tests.integrations.vllm.refusals import refused
from tests.integrations.vllm.scenarios import PHASE

UNIFORM = {"prefill": "nvfp4", "decode": "nvfp4"}


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"prefil": "nvfp4"}, "Unknown policy key 'prefil': did you mean prefill"),
        ({"prefill": "nvfp5"}, "Unknown prefill format 'nvfp5': did you mean nvfp4"),
        ({"prefill": "nvfp4", "decode": "fp8"}, "mixes two quantized formats: use decode=bf16"),
        ({"prefill": "nvfp4", "native": True}, "No native kernel runs nvfp4 on cpu .* choose another format, or allow"),
        ({"prefill": "nvfp4", "ignore": ["*.q_proj"]}, r"names .*q_proj, which vLLM fuses into .*qkv_proj: name all"),
        ({"prefill": "nvfp4", "ignore": ["*.oproj"]}, r"No layer is called '\*\.oproj'.*did you mean '\*\.o_proj'"),
        ({"prefill_weights": "/nowhere"}, "/nowhere is not a folder"),
        ({"prefill_weights": 4}, "prefill_weights is the name of a quantized folder, not 4"),
    ],
)
def test_policies(folder, policy, words):
    refused(words, folder, policy)


def test_beams_would_run_answers_as_prompts(folder):
    """vLLM submits each beam as a new prompt. Where both phases multiply alike, that changes nothing."""
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    with running(folder, PHASE) as llm, pytest.raises(InputError, match="beam search hands answers back as prompts"):
        llm.beam_search([{"prompt_token_ids": [1, 2, 3]}], params)
    with running(folder, UNIFORM) as llm:
        llm.renderer.get_tokenizer = lambda: SimpleNamespace(eos_token_id=0, decode=lambda ids, **_: "")
        assert len(llm.beam_search([{"prompt_token_ids": [1, 2, 3]}], params)[0].sequences) == 2


def test_layers_whose_shape_does_not_fit(tmp_path):
    tiny_model(intermediate_size=248).save_pretrained(tmp_path)
    refused(r"layers.0.mlp.down_proj of shape \[128, 248\]: NVFP4 needs K .* `ignore`", tmp_path, PHASE)


def test_pooling_models(folder):
    refused("Qwen3ForCausalLM runs as a pooling model, which generates nothing", folder, PHASE, runner="pooling")


def test_stores_that_do_not_tell_precisions_apart(folder, tmp_path):
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    example["kv_connector_extra_config"] = {"shared_storage_path": str(tmp_path)}
    refused(
        "ExampleConnector may keep KV under keys that do not tell precisions", folder, PHASE, kv_transfer_config=example
    )


@pytest.fixture
def config(folder) -> VllmConfig:
    """An engine's configuration, that the plugin accepts."""
    made = engine_config(folder, PHASE)
    check_engine(made)
    return made


def set_option(config: VllmConfig, path: str, value: Any) -> None:
    """Set an option that this platform would not let through."""
    *parents, name = path.split(".")
    owner: Any = config
    for parent in parents:
        owner = getattr(owner, parent)
    object.__setattr__(owner, name, value)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("model_config.enable_sleep_mode", True, "Sleep mode .* start without --enable-sleep-mode"),
        ("parallel_config.enable_dbo", True, "Microbatches .* start without them"),
        ("parallel_config.ubatch_size", 2, "Microbatches .* start without them"),
        ("parallel_config.prefill_context_parallel_size", 2, "Prefill context parallelism .* --tensor-parallel-size"),
        ("cache_config.kv_sharing_fast_prefill", True, "--kv-sharing-fast-prefill .* start without it"),
        ("model_config.is_encoder_decoder", True, "Qwen3ForCausalLM is an encoder-decoder"),
        ("compilation_config.cudagraph_mode", CUDAGraphMode.FULL, "choose FULL_AND_PIECEWISE or FULL_DECODE_ONLY"),
    ],
)
def test_options_that_this_platform_lacks(config, option, value, words):
    set_option(config, option, value)
    with pytest.raises(InputError, match=words):
        check_engine(config)


@pytest.mark.parametrize("mode", ["NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"])
def test_graphs_of_one_phase_are_allowed(config, mode):
    set_option(config, "compilation_config.cudagraph_mode", CUDAGraphMode[mode])
    check_engine(config)


def test_adaptive_verification(folder):
    drafting = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    config = engine_config(folder, PHASE, speculative_config=drafting)
    check_engine(config)
    set_option(config, "speculative_config.enable_adaptive_verification", True)
    with pytest.raises(InputError, match="set enable_adaptive_verification to false"):
        check_engine(config)


@pytest.mark.parametrize("version", ["0.26.0", "0.30.1rc1", "0.32.0+cpu", "0.33.2"])
def test_supported_versions(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.25.3", "0.34.0", "1.0", "0.1.dev20+gabc"])
def test_unsupported_versions(version):
    with pytest.raises(InputError, match=re.escape(f"supports vLLM 0.26 to 0.33, not {version}")):
        check_version(version)


def test_two_plugins_of_one_name(monkeypatch):
    class Other(PhaseConfig):
        pass

    monkeypatch.setitem(quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG, METHOD, Other)
    with pytest.raises(InputError, match=rf"The plugin of {__name__} has taken the method mixquant: uninstall it"):
        register()


def test_a_vllm_without_our_names_still_serves_others(monkeypatch, caplog):
    """vLLM calls `register` in every process, whatever the engine: it must not fail there."""
    log = logging.getLogger("vllm.mixquant.integrations.vllm")  # vLLM's loggers hand nothing to the root's
    monkeypatch.setattr(log, "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, log.name)
    monkeypatch.setitem(sys.modules, "mixquant.integrations.vllm.config", None)  # as if an import in it failed
    register()
    assert "this vLLM is none of 0.26 to 0.33" in caplog.text


def test_registering_again_changes_nothing():
    register()
    assert quantization.get_quantization_config(METHOD) is PhaseConfig


@pytest.mark.slow
def test_the_log_says_why_another_process_failed(folder: Path, monkeypatch, capfd):
    """An engine core in its own process: vLLM's error in the front points to the log, which has the sentence."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(RuntimeError, match="See root cause above"):
        engine(folder, {"prefill": "nvfp4", "native": True})
    assert "No native kernel runs nvfp4 on cpu" in "".join(capfd.readouterr())
