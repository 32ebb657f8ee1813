"""What the plugin refuses when a worker begins to build its model: options under which phases could not be exact.

Each is one sentence that names the remedy. Options that some version of vLLM does not have yet count as off.
"""

from __future__ import annotations

from collections.abc import Iterator

import vllm
from packaging.version import Version
from vllm.config import CUDAGraphMode, VllmConfig

from mixquant.errors import InputError
from mixquant.integrations.vllm.stores import BY_BLOCK_HASH, POINT_TO_POINT, connectors

OLDEST, NEWEST = "0.26", "0.33"

PARTIAL = ("*.x_proj", "*.dt_proj", "*.bcdt_proj")
"""Layers that vLLM calls for a part of a step's rows (Mamba's, for prompts and answers apart); they stay BF16."""


def check_version(version: str = vllm.__version__) -> None:
    """Raise InputError outside the versions whose hooks were checked."""
    release = Version(version).release[:2]
    if not Version(OLDEST).release <= release <= Version(NEWEST).release:
        raise InputError(f"mixquant supports vLLM {OLDEST} to {NEWEST}, not {version}: install one of these.")


def check_engine(config: VllmConfig) -> None:
    """Raise InputError for the first option that the plugin cannot serve."""
    for reason in refusals(config):
        raise InputError(reason)


def refusals(config: VllmConfig) -> Iterator[str]:
    """One sentence for each option that phases cannot follow."""
    model, parallel, speculative = config.model_config, config.parallel_config, config.speculative_config
    architecture = ", ".join(model.architectures)
    if model.runner_type == "pooling":
        yield f"{architecture} runs as a pooling model, which generates nothing: leave out --quantization mixquant."
    if model.is_encoder_decoder:
        yield f"{architecture} is an encoder-decoder: mixquant serves decoder-only models."
    if model.enable_sleep_mode:
        yield "Sleep mode has not been tested with quantized copies: start without --enable-sleep-mode."
    if parallel.use_ubatching:
        yield "Microbatches (--enable-dbo, --ubatch-size) split a batch inside a step: start without them."
    if parallel.prefill_context_parallel_size > 1:
        yield "Prefill context parallelism spreads a prompt's rows over ranks: use --tensor-parallel-size instead."
    if config.cache_config.kv_sharing_fast_prefill:
        yield "--kv-sharing-fast-prefill gives layers only a part of a step's rows: start without it."
    if getattr(speculative, "enable_adaptive_verification", False):
        yield "Adaptive verification drops draft rows on the device: set enable_adaptive_verification to false."
    if config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL:
        yield (
            "cudagraph_mode FULL replays mixed steps, whose phases change from step to step: choose FULL_AND_PIECEWISE "
            "or FULL_DECODE_ONLY."
        )
    for name in connectors(config.kv_transfer_config):
        if name not in (*BY_BLOCK_HASH, *POINT_TO_POINT):
            yield (
                f"{name} may keep KV under keys that do not tell precisions apart: use {', '.join(BY_BLOCK_HASH)} as a "
                f"store, or {', '.join(POINT_TO_POINT)} between two servers."
            )
