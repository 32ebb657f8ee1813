"""The contact with vLLM's model runners: the phase of every scheduled token, and the graphs that may replay.

vLLM has two runners: V1 (`gpu_model_runner`, also the CPU's) and V2 (`gpu/model_runner`). Both know on the host, before
each forward, the order of the batch and three numbers of each request; `mixquant.phase.plan` turns them into phases.
Wrapped, for engines whose quantization method is ours and for no others:

    execute_model                    marks a real step, and forgets it afterwards
    V1 _prepare_inputs               the plan, once the batch has its order
    V2 update_requests               how many rows of each phase the step has (V2 picks a graph before it sorts)
    V2 prepare_inputs                the plan, once the batch has its order
    V1 CudagraphDispatcher.dispatch  } no decode graph for a step with prompt rows,
    V2 CudaGraphManager.dispatch     } no piecewise graph for a step with more decode rows than it has places for

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

from mixquant.errors import InputError
from mixquant.integrations.vllm.counters import RowCounters
from mixquant.integrations.vllm.step import StepState
from mixquant.phase import count_rows, plan

V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"
V1_DISPATCH = "vllm.v1.cudagraph_dispatcher"
V2_DISPATCH = "vllm.v1.worker.gpu.cudagraph_utils"

HOOKS: tuple[tuple[str, str, str], ...] = (
    (V1, "GPUModelRunner", "execute_model"),
    (V1, "GPUModelRunner", "_prepare_inputs"),
    (V1_DISPATCH, "CudagraphDispatcher", "dispatch"),
    (V2, "GPUModelRunner", "execute_model"),
    (V2, "GPUModelRunner", "update_requests"),
    (V2, "GPUModelRunner", "prepare_inputs"),
    (V2_DISPATCH, "CudaGraphManager", "dispatch"),
)
"""Module, class and method of everything wrapped here."""

Original = Callable[..., Any]


class PhaseMethod(Protocol):
    """What is used here of an engine's quantization method, where it is ours (`config.PhaseConfig`)."""

    state: StepState
    counters: RowCounters


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


def _v1_execute_model(method: PhaseMethod, runner: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    method.state.live = True
    try:
        return original(*args, **kwargs)
    finally:
        method.state.end()


def _v2_execute_model(method: PhaseMethod, runner: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    dummy = kwargs.get("dummy_run", args[2] if len(args) > 2 else False)
    method.state.live = not dummy
    try:
        return original(*args, **kwargs)
    finally:
        method.state.end()


def _v1_prepare_inputs(
    method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    batch = runner.input_batch
    count = batch.num_reqs
    lengths = batch.num_prompt_tokens[:count].tolist()
    computed = batch.num_computed_tokens_cpu[:count].tolist()
    scheduled = [scheduler_output.num_scheduled_tokens[request] for request in batch.req_ids[:count]]
    _begin(method, runner, lengths, computed, scheduled)
    return original(scheduler_output, *args, **kwargs)


def _v2_update_requests(method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any) -> Any:
    result = original(scheduler_output)
    requests = runner.req_states
    indices = [requests.req_id_to_index[request] for request in scheduler_output.num_scheduled_tokens]
    scheduled = list(scheduler_output.num_scheduled_tokens.values())
    lengths = requests.prompt_len.np[indices].tolist()
    computed = requests.num_computed_tokens_np[indices].tolist()
    method.state.rows = count_rows(lengths, computed, scheduled, method.state.tail)
    return result


def _v2_prepare_inputs(method: PhaseMethod, runner: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    inputs = original(*args, **kwargs)
    requests, indices = runner.req_states, inputs.idx_mapping_np
    lengths = requests.prompt_len.np[indices].tolist()
    computed = requests.num_computed_tokens_np[indices].tolist()
    _begin(method, runner, lengths, computed, inputs.num_scheduled_tokens.tolist())
    return inputs


def _begin(
    method: PhaseMethod, runner: Any, lengths: Sequence[int], computed: Sequence[int], scheduled: Sequence[int]
) -> None:
    state = method.state
    state.rows = count_rows(lengths, computed, scheduled, state.tail)
    method.counters.add(state.rows)
    state.begin(plan(lengths, computed, scheduled, state.tail), runner.device)


def _v1_dispatch(method: PhaseMethod, dispatcher: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    state, forbidden = method.state, set(kwargs.pop("invalid_modes", None) or ())
    if not state.fits_decode_graph():
        forbidden.add(CUDAGraphMode.FULL)
    if not state.fits_mixed_graph():
        forbidden.add(CUDAGraphMode.PIECEWISE)
    chosen = original(*args, **kwargs, invalid_modes=forbidden or None)
    state.replay(piecewise=state.live and chosen[0] is CUDAGraphMode.PIECEWISE)
    return chosen


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
    state = method.state
    if not state.fits_decode_graph():
        # Every decode graph asks for one of these two: without them, only piecewise graphs match.
        uniform_token_count = None
        if "max_query_len" in kwargs:
            kwargs["max_query_len"] = None
    chosen = original(num_reqs, num_tokens, uniform_token_count, *args, **kwargs)
    if chosen.cg_mode is CUDAGraphMode.PIECEWISE and not state.fits_mixed_graph():
        chosen = dataclasses.replace(chosen, cg_mode=CUDAGraphMode.NONE, num_tokens=num_tokens, num_reqs=num_reqs)
    state.replay(piecewise=state.live and chosen.cg_mode is CUDAGraphMode.PIECEWISE)
    return chosen
