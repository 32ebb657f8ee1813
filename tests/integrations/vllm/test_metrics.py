"""What an engine reports: the log lines of its start, what does not fit, and the counters of rows by phase."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from mixquant.devices import available_bytes
from mixquant.errors import InputError
from tests.integrations.vllm import engines

LENGTHS = engines.PROMPT_LENGTHS
NEW_TOKENS = 6
NVFP4 = {"prefill": "nvfp4"}


def counters(registry: CollectorRegistry = REGISTRY) -> dict[str, float]:
    """Our counters in a registry by their short names, all engines together."""
    totals: dict[str, float] = dict.fromkeys(("prompt_rows", "tail_rows", "decode_rows", "mixed_steps", "steps"), 0.0)
    for metric in registry.collect():
        if metric.name.startswith("mixquant_"):
            totals[metric.name.removeprefix("mixquant_")] += sum(sample.value for sample in metric.samples)
    return totals


def counted(use: Callable[[], object]) -> dict[str, float]:
    """What a call adds to the counters."""
    before = counters()
    use()
    return {name: total - before[name] for name, total in counters().items()}


def expected_rows(tail: int) -> dict[str, float]:
    """The rows of all prompts without a cache: one decode row for each new token but the last."""
    tails = sum(min(tail, length) for length in LENGTHS)
    return {
        "prompt_rows": sum(LENGTHS) - tails,
        "tail_rows": tails,
        "decode_rows": len(LENGTHS) * (NEW_TOKENS - 1),
    }


def rows(counts: dict[str, float]) -> dict[str, float]:
    return {name: count for name, count in counts.items() if name.endswith("_rows")}


@pytest.mark.parametrize("tail", [0, 1, 7])
def test_every_row_of_concurrent_chunked_prompts_is_counted_once(folder: Path, tail: int) -> None:
    with engines.running(folder, NVFP4 | {"tail": tail}, enable_prefix_caching=False) as llm:
        counts = counted(lambda: engines.answers(llm, engines.prompts(), NEW_TOKENS))
    assert rows(counts) == expected_rows(tail)
    assert 0 < counts["mixed_steps"] < counts["steps"]


def test_cached_prefixes_are_no_rows(folder: Path) -> None:
    with engines.running(folder, NVFP4) as llm:
        first = counted(lambda: engines.answers(llm, engines.prompts(), NEW_TOKENS))
        again: list[engines.Answer] = []
        second = counted(lambda: again.extend(engines.answers(llm, engines.prompts(), NEW_TOKENS)))
    cached = sum(answer.cached_tokens for answer in again)
    assert cached > 0
    assert second["prompt_rows"] == expected_rows(tail=1)["prompt_rows"] - cached
    assert second["prompt_rows"] < first["prompt_rows"]
    assert second["tail_rows"] == first["tail_rows"] == len(LENGTHS)


def test_steps_of_one_phase_are_not_mixed(folder: Path) -> None:
    """One prompt at a time with tail 0: a step is all prompt, or all answer."""
    with engines.running(folder, NVFP4 | {"tail": 0}) as llm:
        counts = counted(lambda: [engines.answers(llm, [prompt], NEW_TOKENS) for prompt in engines.prompts()])
    assert counts["mixed_steps"] == 0
    assert counts["steps"] > len(LENGTHS) * (NEW_TOKENS - 1)


def test_an_engine_without_our_method_is_not_counted(folder: Path) -> None:
    with engines.running(folder, None) as llm:
        counts = counted(lambda: engines.answers(llm, engines.prompts(), NEW_TOKENS))
    assert set(counts.values()) == {0}


def test_several_api_servers_read_ours_where_vllm_keeps_theirs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    with engines.running(folder, NVFP4, enable_prefix_caching=False) as llm:
        own = counted(lambda: engines.answers(llm, engines.prompts(), NEW_TOKENS))
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    assert rows(counters(registry)) == expected_rows(tail=1)
    assert set(own.values()) == {0}


def test_counting_takes_microseconds(folder: Path) -> None:
    from mixquant.phase import Rows

    with engines.running(folder, NVFP4) as llm:
        counting = llm.llm_engine.vllm_config.quant_config.counters
        start = time.perf_counter()
        for _ in range(1000):
            counting.add(Rows(prefill=3, decode=2, tail=1))
        assert (time.perf_counter() - start) / 1000 < 100e-6  # about five; a busy machine gets some slack


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a start writes to its log; vLLM drops handlers that others have added."""
    from mixquant.integrations.vllm import announce

    lines: list[str] = []
    monkeypatch.setattr(announce.logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def started(folder: Path, policy: dict[str, object], log: list[str], **options: object) -> list[str]:
    with engines.running(folder, policy, **options):
        return [line.removeprefix("mixquant ") for line in log]


def test_the_start_says_policy_kernels_and_bill(folder: Path, log: list[str]) -> None:
    policy, kernels, memory = started(folder, NVFP4 | {"tail": 2}, log)
    assert policy.startswith("policy: prefill=nvfp4, decode=bf16, tail=2")
    assert kernels == "kernels: prefill emulation.nvfp4 (12 layers, emulated), decode vLLM FP32 (12 layers)"
    linears = 3 * 4 * (128 * 256 + 128 * 128 + 512 * 128 + 128 * 256)
    assert memory.startswith(
        f"memory: {linears / 2**20:.1f} MiB of linear layers in FP32, quantization adds {linears / 2**20:.1f} MiB, "
    )
    assert f"KV cache of at most 1.00 GiB or {2**30 // (3 * 2 * 2 * 32 * 4):,} tokens" in memory


def test_the_start_counts_only_layers_that_are_quantized(folder: Path, log: list[str]) -> None:
    _, kernels, memory = started(folder, {"prefill": "nvfp4", "decode": "nvfp4", "ignore": ["*.o_proj"]}, log)
    assert (
        kernels == "kernels: prefill emulation.nvfp4 (9 layers, emulated), decode emulation.nvfp4 (9 layers, emulated)"
    )
    assert "quantization adds 0.0 MiB" in memory  # the copies take the place of the weights


def test_what_does_not_fit_is_refused_with_the_contexts_that_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    """A context whose KV cache takes twice the memory that is free; many heads, so that it is not all that long."""
    heads, token = 256, 3 * 2 * 256 * 32 * 4
    free = available_bytes(torch.device("cpu"))
    assert free is not None
    context = 2 * free // token
    engines.tiny_model(num_attention_heads=heads, num_key_value_heads=heads).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    with pytest.raises(InputError, match="do not fit") as refusal:
        engines.engine(tmp_path, NVFP4, max_model_len=context, max_num_seqs=1, gpu_memory_utilization=0.01)
    assert not log
    longest = re.findall(r"([\d,]+) in (\w+)", str(refusal.value))
    fits = {format: int(tokens.replace(",", "")) for tokens, format in longest}
    assert fits["int8"] < fits["bf16"]
    assert 0.8 * context / 2 < fits["bf16"] < 1.2 * context / 2
