"""vLLM's own dispatchers of both runners, on a CPU over the configuration of a GPU, wrapped by us."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CompilationMode, CUDAGraphMode

from mixquant.integrations.vllm import runner
from mixquant.integrations.vllm.graphs import widen_graphs
from mixquant.integrations.vllm.places import PLACES, places_of
from mixquant.phase import RowCounts
from tests.integrations.vllm.engines import engine_config

CPU = torch.device("cpu")

FEW_SIZES = (1, 2, 4, 8, 64, 128, 256, 512)
VLLM_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Rows of the graphs that vLLM 0.26 to 0.33 capture by themselves on Hopper, where 256 requests run at once or more."""


def gpu_config(folder: Path, sizes: tuple[int, ...] = (), policy: dict[str, Any] | None = None, **options: Any):
    """The configuration of an engine that captures graphs of these numbers of rows, or of those that vLLM takes by
    itself, and of the wider ones."""
    policy = policy or {"prefill": "nvfp4", "tail": 1}
    options = {"max_num_batched_tokens": 8192, "max_num_seqs": 256} | options
    config = engine_config(folder, policy, enforce_eager=False, **options)
    compilation = config.compilation_config
    compilation.mode, compilation.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.splitting_ops = list(compilation._attention_ops)
    compilation.cudagraph_capture_sizes = list(sizes) or None
    compilation.max_cudagraph_capture_size = max(sizes, default=None)
    config._set_cudagraph_sizes()
    config.quant_config.widened = widen_graphs(config)
    return config


def v1_dispatcher(config: Any) -> Any:
    """V1's dispatcher once all graphs are captured."""
    from vllm.v1 import cudagraph_dispatcher

    runner.install()
    made = cudagraph_dispatcher.CudagraphDispatcher(config)
    made.initialize_cudagraph_keys(config.compilation_config.cudagraph_mode, 1)
    made.get_capture_descs()
    return made


def taken_by_v1(dispatcher: Any, rows: RowCounts) -> tuple[int, int] | None:
    """Rows and places of the graph that a step of such rows takes, None if it takes none; the state knows them."""
    state = dispatcher.vllm_config.quant_config.state
    state.live, state.rows = True, rows
    try:
        mode, chosen = dispatcher.dispatch(rows.prefill + rows.decode)
        graph = (chosen.num_tokens, places_of(chosen)) if mode is CUDAGraphMode.PIECEWISE else None
        assert (state.piecewise, state.places) == (graph is not None, graph[1] if graph else PLACES[0])
    finally:
        state.end()
    assert state.places == PLACES[0]
    return graph


def taken_by_v2(manager: Any, rows: RowCounts, requests: int) -> tuple[int, int] | None:
    """The same in V2."""
    state, count = manager.vllm_config.quant_config.state, rows.prefill + rows.decode
    state.live, state.rows = True, rows
    try:
        chosen = manager.dispatch(requests, count, None, 0)
        graph = (chosen.num_tokens, state.places) if chosen.cg_mode is CUDAGraphMode.PIECEWISE else None
        assert graph or (chosen.cg_mode, chosen.num_tokens) == (CUDAGraphMode.NONE, count)
        assert state.piecewise == (graph is not None)
        return graph
    finally:
        state.end()


def v2_manager(config: Any, monkeypatch: pytest.MonkeyPatch, forward: Any = lambda desc, mode: None) -> Any:
    """V2's graph manager, which has had its piecewise graphs captured by `forward(desc, mode)`. Its full graphs, which
    take a GPU, count as captured."""
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils

    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True))
    monkeypatch.setattr(cudagraph_utils, "graph_capture", lambda device: nullcontext())
    monkeypatch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    runner.install()
    made = cudagraph_utils.ModelCudaGraphManager(config, CPU, CUDAGraphMode.FULL_AND_PIECEWISE, decode_query_len=1)
    full = made._capture_descs.pop(CUDAGraphMode.FULL)
    cudagraph_utils.CudaGraphManager.capture(made, lambda desc, warmup: lambda mode: forward(desc, mode))
    made._capture_descs[CUDAGraphMode.FULL] = full
    return made
