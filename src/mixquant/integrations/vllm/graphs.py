"""The CUDA graphs of a step: which are captured, and which one may replay it.

vLLM has graphs for decode steps (full) and for all others (piecewise). A captured step computes its rows by fixed
products, so a graph may replay a step only if these are the products of its rows' phases. `widen_graphs` has larger
ones captured. Wrapped:

    V1 CudagraphDispatcher.dispatch  } no decode graph for a step with prompt rows, and the piecewise graph that has
    V2 CudaGraphManager.dispatch     } places for the step's decode rows (places.py), if there is one; without a
                                     prefill row, one of precise products only

and while graphs are captured, and where they replay:

    V1 get_capture_descs             } the piecewise graphs with more places join those that vLLM captures,
    V2 CudaGraphManager.capture      }
    V1 _warmup_and_capture           } and the layers are told how many places to record
    V2 CudaGraphManager.capture      }
    V1 profile_cudagraph_memory      what they will take (graph_memory.py)
    V2 run_pw_graph                  the graph's key in the forward context says its places (V1's comes from `dispatch`)
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from mixquant.errors import InputError
from mixquant.integrations.vllm.graph_memory import GraphMemory, free
from mixquant.integrations.vllm.hooks import Original, PhaseMethod
from mixquant.integrations.vllm.places import (
    ALL,
    PLACES,
    WIDE_SIZES,
    Graphs,
    graphs_for,
    placed,
    places_of,
    with_places,
)
from mixquant.integrations.vllm.step import StepState

DISPATCHER = "vllm.v1.cudagraph_dispatcher"  # of V1
MANAGER = "vllm.v1.worker.gpu.cudagraph_utils"  # of V2

logger = init_logger(f"vllm.{__name__}")


def widen_graphs(config: VllmConfig) -> bool:
    """Capture piecewise graphs for steps of up to 2,048 rows where the limit is the one that vLLM takes by itself, also
    if somebody names that number; and whether it was.

    Up to there a step with rows of both phases is bound by launches (twice as many as BF16's), not by its products
    (benchmarks/results/vllm-h200.md: a prompt of 2,048 tokens from a graph, and in an earlier run without).
    Called in the worker before the model is built; the runner reads the sizes after that.
    """
    compilation = config.compilation_config
    piecewise = compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_piecewise_cudagraphs()
    if not piecewise or compilation.max_cudagraph_capture_size != _limit_by_vllm(config):
        return False
    capture_more(config, WIDE_SIZES)
    return True


def capture_more(config: VllmConfig, sizes: Sequence[int]) -> None:
    """Capture piecewise graphs of these numbers of rows too, ascending, where they are beyond the largest of now."""
    compilation = config.compilation_config
    most = config.scheduler_config.max_num_batched_tokens
    wider = [size for size in sizes if compilation.max_cudagraph_capture_size < size <= most]
    if wider:
        compilation.cudagraph_capture_sizes = sorted({*compilation.cudagraph_capture_sizes, *wider})
        compilation.max_cudagraph_capture_size = wider[-1]


def _limit_by_vllm(config: VllmConfig) -> int:
    """The largest step that vLLM would capture by itself. It follows from the GPU, `max_num_seqs` and speculation, by
    rules that differ from version to version, and the configuration does not say who set it: so vLLM is asked."""
    asked = copy.copy(config)
    asked.compilation_config = compilation = copy.copy(config.compilation_config)
    compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes = None
    asked._set_cudagraph_sizes()
    limit: int = compilation.max_cudagraph_capture_size
    return limit


def v1_dispatch(
    method: PhaseMethod, dispatcher: Any, original: Original, num_tokens: int, *args: Any, **kwargs: Any
) -> Any:
    state, forbidden = method.state, set(kwargs.pop("invalid_modes", None) or ())
    if not state.fits_decode_graph():
        forbidden.add(CUDAGraphMode.FULL)
    chosen = original(num_tokens, *args, **kwargs, invalid_modes=forbidden or None)
    if chosen[0] is not CUDAGraphMode.PIECEWISE:
        return _replays(state, None, chosen)
    graph = state.piecewise_graph(chosen[1].num_tokens, _graphs(dispatcher))
    if graph is None:
        forbidden.add(CUDAGraphMode.PIECEWISE)
        return _replays(state, None, original(num_tokens, *args, **kwargs, invalid_modes=forbidden))
    rows, places = graph
    if rows > chosen[1].num_tokens:
        chosen = original(rows, *args, **kwargs, invalid_modes=forbidden | {CUDAGraphMode.FULL})
    return _replays(state, places, (chosen[0], placed(chosen[1], places)))


def v2_dispatch(
    method: PhaseMethod,
    manager: Any,
    original: Original,
    num_reqs: int,
    num_tokens: int,
    uniform_token_count: int | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    # Every decode graph asks for one of these two: without them, only piecewise graphs match.
    mixed = kwargs | {"max_query_len": None} if "max_query_len" in kwargs else kwargs
    state = method.state
    if not state.fits_decode_graph():
        uniform_token_count, kwargs = None, mixed
    chosen = original(num_reqs, num_tokens, uniform_token_count, *args, **kwargs)
    if chosen.cg_mode is not CUDAGraphMode.PIECEWISE:
        return _replays(state, None, chosen)
    graph = state.piecewise_graph(chosen.num_tokens, _graphs(manager))
    if graph is None:
        uncaptured = {"cg_mode": CUDAGraphMode.NONE, "num_tokens": num_tokens, "num_reqs": num_reqs}
        return _replays(state, None, dataclasses.replace(chosen, **uncaptured))
    rows, places = graph
    if rows > chosen.num_tokens:
        chosen = original(num_reqs, rows, None, *args, **mixed)
    return _replays(state, places, chosen)


def _replays(state: StepState, places: int | None, chosen: Any) -> Any:
    """Tell the state of a real step which graph replays it. In dummy runs it keeps the places that are recorded."""
    if state.live:
        state.replay(places)
    return chosen


def _graphs(owner: Any) -> Graphs:
    """The additional graphs that a dispatcher or manager has had captured. None for those of draft models, which vLLM
    captures by other ways."""
    graphs: Graphs = vars(owner).get("mixquant_graphs", Graphs())
    return graphs


def _add_graphs(method: PhaseMethod, owner: Any, descriptors: Sequence[Any]) -> list[Any]:
    """vLLM's piecewise descriptors, and those of the additional graphs."""
    sizes = {descriptor.num_tokens for descriptor in descriptors}
    state = method.state
    owner.mixquant_graphs = graphs = graphs_for(owner.vllm_config, sizes, state.tail, state.short.min_prompt)
    added = with_places(descriptors, graphs)
    if graphs.rows:
        more = ", ".join("all" if places == ALL else str(places) for places in graphs.rows)
        logger.info_once("mixquant graphs: %d more, for %s precise rows", len(added) - len(descriptors), more)
    return added


def v1_get_capture_descs(method: PhaseMethod, dispatcher: Any, original: Original) -> Any:
    described = [
        (mode, _add_graphs(method, dispatcher, found) if mode is CUDAGraphMode.PIECEWISE else found)
        for mode, found in original()
    ]
    if method.profiled is not None:
        method.profiled.counts = {mode: len(found) for mode, found in described}
    return described


def v1_profile_cudagraph_memory(method: PhaseMethod, runner: Any, original: Original) -> int:
    method.profiled = profiled = GraphMemory()
    try:
        estimate = profiled.correct(original())
    finally:
        method.profiled = None
    logger.info("mixquant: CUDA graphs will take %.2f GiB", estimate / 2**30)
    return estimate


def v1_warmup_and_capture(
    method: PhaseMethod, runner: Any, original: Original, desc: Any, *args: Any, **kwargs: Any
) -> Any:
    # Both the warm-up, which compiles kernels for a product's shape, and the recording. Both dispatch by themselves.
    method.state.places = places_of(desc)
    before = free() if method.profiled else 0
    try:
        result = original(desc, *args, **kwargs)
    finally:
        method.state.places = PLACES[0]
    if method.profiled:
        method.profiled.samples.setdefault(kwargs["cudagraph_runtime_mode"], []).append(before - free())
    return result


def v2_capture(
    method: PhaseMethod, manager: Any, original: Original, create_forward_fn: Original, *args: Any, **kwargs: Any
) -> Any:
    found = getattr(manager, "_capture_descs", None)
    kind = getattr(sys.modules[MANAGER], "ModelCudaGraphManager", None)
    if found is None or kind is None:
        missing = "ModelCudaGraphManager" if kind is None else "CudaGraphManager._capture_descs"
        raise InputError(f"This vLLM has no {missing}: install one of the versions that mixquant supports.")
    if not isinstance(manager, kind) or CUDAGraphMode.PIECEWISE not in found:  # a draft model's, or full graphs only
        return original(create_forward_fn, *args, **kwargs)
    state = method.state

    def create(desc: Any, *args: Any, **kwargs: Any) -> Original:
        forward = create_forward_fn(desc, *args, **kwargs)

        def recorded(mode: CUDAGraphMode) -> Any:
            state.places = places_of(desc)  # for the warm-up too, which compiles kernels for a product's shape
            return forward(mode)

        return recorded

    piecewise = _add_graphs(method, manager, found[CUDAGraphMode.PIECEWISE])
    manager._capture_descs = {**found, CUDAGraphMode.PIECEWISE: piecewise}
    try:
        return original(create, *args, **kwargs)
    finally:
        manager._capture_descs = found
        state.places = PLACES[0]


def v2_run_pw_graph(
    method: PhaseMethod, manager: Any, original: Original, model: Any, model_inputs: dict[str, Any]
) -> Any:
    context = get_forward_context()
    context.batch_descriptor = placed(context.batch_descriptor, method.state.places)
    return original(model, model_inputs)
