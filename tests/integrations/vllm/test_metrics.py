"""What an engine reports: the log lines of its start, what does not fit, and the counters of rows by phase.

Five engines are started once each, and asked for all that the tests look at.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from mixquant.devices import available_bytes
from mixquant.errors import InputError
from mixquant.policy import Policy
from tests.integrations.vllm import engines

LENGTHS = engines.PROMPT_LENGTHS
NEW_TOKENS = 6
NVFP4 = {"prefill": "nvfp4", "tail": 1}
UNCACHED = {"enable_prefix_caching": False}

ENGINES: dict[str, tuple[dict[str, object] | None, dict[str, Any]]] = {
    "phase": (NVFP4 | {"tail": 0}, UNCACHED),
    "uniform": ({"prefill": "nvfp4", "decode": "nvfp4", "tail": 7, "ignore": ["*.o_proj"]}, UNCACHED),
    "cached": (NVFP4, {}),
    "short prompts": (NVFP4 | {"min_prompt": 24}, UNCACHED),
    "stock": (None, UNCACHED),
}
"""Policy and vLLM's options. The one with a prefix cache counts where several API servers would look."""

Counts = dict[str, float]


@dataclass(frozen=True)
class Asked:
    """What some prompts have added to the counters, and how many of their tokens came from the prefix cache."""

    counts: Counts
    cached: int

    @property
    def rows(self) -> Counts:
        return {name: count for name, count in self.counts.items() if name.endswith("_rows")}


@dataclass(frozen=True)
class Seen:
    """What one engine reported.

    log: the lines of its start. together: all prompts at once, in chunks; again: the same once more; alone: one at a
    time. front: what all of it added to this process's own registry.
    """

    log: list[str]
    together: Asked
    again: Asked
    alone: Asked
    front: Counts


def counters(registry: CollectorRegistry = REGISTRY) -> Counts:
    """Our counters in a registry by their short names, all engines together."""
    totals: Counts = dict.fromkeys(("prompt_rows", "tail_rows", "decode_rows", "mixed_steps", "steps"), 0.0)
    for metric in registry.collect():
        if metric.name.startswith("mixquant_"):
            totals[metric.name.removeprefix("mixquant_")] += sum(sample.value for sample in metric.samples)
    return totals


def added(before: Counts, after: Counts) -> Counts:
    return {name: total - before[name] for name, total in after.items()}


@pytest.fixture(scope="module")
def seen(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seen]:
    """What an engine of ENGINES reports; each is started once."""

    @functools.cache
    def see(name: str) -> Seen:
        policy, options = ENGINES[name]
        with pytest.MonkeyPatch.context() as patch:
            registry = REGISTRY if name != "cached" else shared_registry(patch, tmp_path_factory.mktemp("metrics"))
            log = logged(patch)
            with engines.running(folder, policy, **options) as llm:
                return report(llm, log, registry)

    return see


def shared_registry(patch: pytest.MonkeyPatch, directory: Path) -> CollectorRegistry:
    """What vLLM answers /metrics from where several API servers share a directory."""
    patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return registry


def logged(patch: pytest.MonkeyPatch) -> list[str]:
    """The lines that a start writes to its log; vLLM drops handlers that others have added."""
    from mixquant.integrations.vllm import announce

    lines: list[str] = []
    patch.setattr(
        announce.logger, "info", lambda text, *values: lines.append((text % values).removeprefix("mixquant "))
    )
    return lines


def report(llm: Any, log: list[str], registry: CollectorRegistry) -> Seen:
    front, batch = counters(), engines.prompts()
    asked = [ask(llm, groups, registry) for groups in ([batch], [batch], [[prompt] for prompt in batch])]
    return Seen(log, *asked, front=added(front, counters()))


def ask(llm: Any, groups: list[list[list[int]]], registry: CollectorRegistry) -> Asked:
    before = counters(registry)
    answers = [answer for group in groups for answer in engines.answers(llm, group, NEW_TOKENS)]
    return Asked(added(before, counters(registry)), sum(answer.cached_tokens for answer in answers))


def expected_rows(tail: int, cached: int = 0, min_prompt: int = 0) -> Counts:
    """The rows of all prompts: one decode row for each new token but the last."""
    tails = sum(length if length < min_prompt else min(tail, length) for length in LENGTHS)
    return {
        "prompt_rows": sum(LENGTHS) - tails - cached,
        "tail_rows": tails,
        "decode_rows": len(LENGTHS) * (NEW_TOKENS - 1),
    }


@pytest.mark.parametrize(("name", "tail"), [("phase", 0), ("uniform", 7), ("cached", 1)])
def test_every_row_of_concurrent_chunked_prompts_is_counted_once(
    seen: Callable[[str], Seen], name: str, tail: int
) -> None:
    together = seen(name).together
    assert together.rows == expected_rows(tail, together.cached)
    assert together.rows != expected_rows(tail + 1, together.cached)
    assert 0 < together.counts["mixed_steps"] < together.counts["steps"]


def test_rows_of_short_prompts_are_precise_prompt_rows(seen: Callable[[str], Seen]) -> None:
    rows = seen("short prompts").together.rows
    assert rows == expected_rows(1, min_prompt=24)
    assert rows != expected_rows(1)


def test_the_start_says_which_prompts_are_short(seen: Callable[[str], Seen]) -> None:
    policy, _, short, _ = seen("short prompts").log
    assert "tail=1, min_prompt=24, " in policy
    assert short == "short prompts: those of fewer than 24 new tokens are read in FP32 (min_prompt)"
    assert "min_prompt=0, " in seen("phase").log[0]
    assert len(seen("phase").log) == 3


def test_a_devices_default_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixquant.integrations.vllm import announce, short_prompts

    monkeypatch.setattr(short_prompts, "_reads_fp8", lambda format: True)
    said = announce.Startup(Policy(prefill="fp8"))._short_prompts("BF16")
    assert said.startswith(
        "those of fewer than 512 new tokens are read in BF16 (min_prompt, the default on this device"
    )


def test_cached_prefixes_are_no_rows(seen: Callable[[str], Seen]) -> None:
    first, again = seen("cached").together, seen("cached").again
    assert again.cached > first.cached
    assert again.rows == expected_rows(1, again.cached)


def test_steps_of_one_phase_are_not_mixed(seen: Callable[[str], Seen]) -> None:
    """One prompt at a time with tail 0: a step is all prompt, or all answer."""
    counts = seen("phase").alone.counts
    assert counts["mixed_steps"] == 0
    assert counts["steps"] > len(LENGTHS) * (NEW_TOKENS - 1)


def test_an_engine_without_our_method_is_not_counted(seen: Callable[[str], Seen]) -> None:
    assert set(seen("stock").front.values()) == {0}
    assert all(seen("uniform").front.values())  # control


def test_several_api_servers_read_ours_where_vllm_keeps_theirs(seen: Callable[[str], Seen]) -> None:
    """And only there: the directory of this process alone gets nothing."""
    assert set(seen("cached").front.values()) == {0}
    assert all(seen("cached").together.counts.values())


def test_the_start_says_policy_kernels_and_bill(seen: Callable[[str], Seen]) -> None:
    policy, kernels, memory = seen("phase").log
    assert policy.startswith("policy: prefill=nvfp4, decode=bf16, tail=0")
    assert kernels == "kernels: prefill emulation.nvfp4 (12 layers, emulated), decode vLLM FP32 (12 layers)"
    linears = 3 * 4 * (128 * 256 + 128 * 128 + 512 * 128 + 128 * 256)
    assert memory.startswith(
        f"memory: {linears / 2**20:.1f} MiB of linear layers in FP32, quantization adds {linears / 2**20:.1f} MiB "
        "(64.0 bits a weight), "
    )
    assert f"KV cache of at most 1.00 GiB or {2**30 // (3 * 2 * 2 * 32 * 4):,} tokens" in memory


def test_the_start_counts_only_layers_that_are_quantized(seen: Callable[[str], Seen]) -> None:
    _, kernels, memory = seen("uniform").log
    assert (
        kernels == "kernels: prefill emulation.nvfp4 (9 layers, emulated), decode emulation.nvfp4 (9 layers, emulated)"
    )
    assert "quantization adds 0.0 MiB" in memory  # the copies take the place of the weights


def test_what_does_not_fit_is_refused_with_the_contexts_that_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    log = logged(monkeypatch)
    with pytest.raises(InputError, match="do not fit") as refusal:
        engines.engine(tmp_path, NVFP4, max_model_len=context, max_num_seqs=1, gpu_memory_utilization=0.01)
    assert not log
    longest = re.findall(r"([\d,]+) in (\w+)", str(refusal.value))
    fits = {format: int(tokens.replace(",", "")) for tokens, format in longest}
    assert fits["int8"] < fits["bf16"]
    assert 0.8 * context / 2 < fits["bf16"] < 1.2 * context / 2
