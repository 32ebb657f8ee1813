"""The contact with vLLM's model runners: the phase of every scheduled token, and the graphs that may replay.

vLLM has two runners: V1 (`gpu_model_runner`, also the CPU's) and V2 (`gpu/model_runner`). Both know on the host, before
each forward, the order of the batch and three numbers of each request; `mixquant.phase.plan` turns them into phases.
Wrapped, for engines whose quantization method is ours and for no others:

    execute_model                    marks a real step, notes which new requests are read precisely (short_prompts.py),
                                     and forgets the step afterwards
    V1 _prepare_inputs               the plan, once the batch has its order
    V2 update_requests               how many rows of each phase the step has (V2 picks a graph before it sorts)
    V2 prepare_inputs                the plan, once the batch has its order
    V1 CudagraphDispatcher.dispatch  } no decode graph for a step with prompt rows, and the piecewise graph that has
    V2 CudaGraphManager.dispatch     } places for the step's decode rows (places.py), if there is one; without a
                                     prefill row, one of precise products only

and while graphs are captured, and where they replay:

    V1 get_capture_descs             } the piecewise graphs with more places join those that vLLM captures,
    V2 CudaGraphManager.capture      }
    V1 _warmup_and_capture           } and the layers are told how many places to record
    V2 CudaGraphManager.capture      }
    V2 run_pw_graph                  the graph's key in the forward context says its places (V1's comes from `dispatch`)

The prompt's length is the request's own: V2's `prefill_len` counts recomputed answers after a preemption, V1's
`is_prefilling` marks whole requests.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger

from mixquant.errors import InputError
from mixquant.integrations.vllm.counters import RowCounters
from mixquant.integrations.vllm.graph_memory import GraphMemory, free
from mixquant.integrations.vllm.places import ALL, PLACES, Graphs, graphs_for, placed, places_of, with_places
from mixquant.integrations.vllm.step import StepState
from mixquant.phase import count_rows, plan

V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"
V1_DISPATCH = "vllm.v1.cudagraph_dispatcher"
V2_DISPATCH = "vllm.v1.worker.gpu.cudagraph_utils"

HOOKS: tuple[tuple[str, str, str], ...] = (
    (V1, "GPUModelRunner", "execute_model"),
    (V1, "GPUModelRunner", "_prepare_inputs"),
    (V1, "GPUModelRunner", "_warmup_and_capture"),
    (V1, "GPUModelRunner", "profile_cudagraph_memory"),
    (V1_DISPATCH, "CudagraphDispatcher", "dispatch"),
    (V1_DISPATCH, "CudagraphDispatcher", "get_capture_descs"),
    (V2, "GPUModelRunner", "execute_model"),
    (V2, "GPUModelRunner", "update_requests"),
    (V2, "GPUModelRunner", "prepare_inputs"),
    (V2_DISPATCH, "CudaGraphManager", "dispatch"),
    (V2_DISPATCH, "CudaGraphManager", "capture"),
    (V2_DISPATCH, "CudaGraphManager", "run_pw_graph"),
)
"""Module, class and method of everything wrapped here."""

Original = Callable[..., Any]

logger = init_logger(f"vllm.{__name__}")


class PhaseMethod(Protocol):
    """What is used here of an engine's quantization method, where it is ours (`config.PhaseConfig`)."""

    state: StepState
    counters: RowCounters
    profiled: GraphMemory | None


def install() -> None:
    """Wrap the runners that this worker has loaded; calling it again changes nothing.

    Raises InputError where a name is missing: another vLLM than the supported ones.
    """
    around = globals()
    for module, owner, name in HOOKS:
        if module in sys.modules:
            kind = "v2" if module in (V2, V2_DISPATCH) else "v1"
            wrap(getattr(sys.modules[module], owner, None), name, around[f"_{kind}_{name.lstrip('_')}"])


def wrap(owner: type | None, name: str, around: Callable[..., Any]) -> None:
    """Let `around(method, self, original, ...)` stand in for a function of `owner`, in engines whose quantization
    method is ours; again changes nothing."""
    original = getattr(owner, name, None)
    if original is None:
        raise InputError(f"This vLLM has no {owner}.{name}: install one of the versions that mixquant supports.")
    if getattr(original, "mixquant", False):
        return

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = _method(self)
        bound = functools.partial(original, self)
        return bound(*args, **kwargs) if method is None else around(method, self, bound, *args, **kwargs)

    wrapper.mixquant = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)


def _method(owner: Any) -> PhaseMethod | None:
    """The method of the engine that a runner or dispatcher belongs to, if it is ours.

    Told by what it holds: config.py imports this module, so this one cannot know its class.
    """
    method: PhaseMethod | None = owner.vllm_config.quant_config
    return method if isinstance(getattr(method, "state", None), StepState) else None


def _v1_execute_model(
    method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    method.state.live = True
    method.state.short.follow(scheduler_output)
    try:
        return original(scheduler_output, *args, **kwargs)
    finally:
        method.state.end()


def _v2_execute_model(
    method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    dummy = kwargs.get("dummy_run", args[1] if len(args) > 1 else False)
    method.state.live = not dummy
    if not dummy:
        method.state.short.follow(scheduler_output)
    try:
        return original(scheduler_output, *args, **kwargs)
    finally:
        method.state.end()


def _v1_prepare_inputs(
    method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    batch = runner.input_batch
    count = batch.num_reqs
    lengths = batch.num_prompt_tokens[:count].tolist()
    computed = batch.num_computed_tokens_cpu[:count].tolist()
    requests = batch.req_ids[:count]
    scheduled = [scheduler_output.num_scheduled_tokens[request] for request in requests]
    _begin(method, runner, requests, lengths, computed, scheduled)
    return original(scheduler_output, *args, **kwargs)


def _v2_update_requests(method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any) -> Any:
    result = original(scheduler_output)
    requests = runner.req_states
    names = list(scheduler_output.num_scheduled_tokens)
    scheduled = list(scheduler_output.num_scheduled_tokens.values())
    indices = [requests.req_id_to_index[request] for request in names]
    lengths = requests.prompt_len.np[indices].tolist()
    computed = requests.num_computed_tokens_np[indices].tolist()
    method.state.rows = count_rows(lengths, computed, scheduled, method.state.tails(names))
    return result


def _v2_prepare_inputs(method: PhaseMethod, runner: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    inputs = original(*args, **kwargs)
    requests, indices = runner.req_states, inputs.idx_mapping_np
    lengths = requests.prompt_len.np[indices].tolist()
    computed = requests.num_computed_tokens_np[indices].tolist()
    _begin(method, runner, inputs.req_ids, lengths, computed, inputs.num_scheduled_tokens.tolist())
    return inputs


def _begin(
    method: PhaseMethod,
    runner: Any,
    requests: Sequence[str],
    lengths: Sequence[int],
    computed: Sequence[int],
    scheduled: Sequence[int],
) -> None:
    state, tails = method.state, method.state.tails(requests)
    state.rows = count_rows(lengths, computed, scheduled, tails)
    method.counters.add(state.rows)
    state.begin(plan(lengths, computed, scheduled, tails), runner.device)


def _v1_dispatch(
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


def _v2_dispatch(
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


def _v1_get_capture_descs(method: PhaseMethod, dispatcher: Any, original: Original) -> Any:
    described = [
        (mode, _add_graphs(method, dispatcher, found) if mode is CUDAGraphMode.PIECEWISE else found)
        for mode, found in original()
    ]
    if method.profiled is not None:
        method.profiled.counts = {mode: len(found) for mode, found in described}
    return described


def _v1_profile_cudagraph_memory(method: PhaseMethod, runner: Any, original: Original) -> int:
    method.profiled = profiled = GraphMemory()
    try:
        estimate = profiled.correct(original())
    finally:
        method.profiled = None
    logger.info("mixquant: CUDA graphs will take %.2f GiB", estimate / 2**30)
    return estimate


def _v1_warmup_and_capture(
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


def _v2_capture(
    method: PhaseMethod, manager: Any, original: Original, create_forward_fn: Original, *args: Any, **kwargs: Any
) -> Any:
    found = getattr(manager, "_capture_descs", None)
    kind = getattr(sys.modules[V2_DISPATCH], "ModelCudaGraphManager", None)
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


def _v2_run_pw_graph(
    method: PhaseMethod, manager: Any, original: Original, model: Any, model_inputs: dict[str, Any]
) -> Any:
    context = get_forward_context()
    context.batch_descriptor = placed(context.batch_descriptor, method.state.places)
    return original(model, model_inputs)
