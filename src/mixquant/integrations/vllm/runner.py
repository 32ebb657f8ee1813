"""The contact with vLLM's model runners: the phase of every scheduled token.

vLLM has two runners: V1 (`gpu_model_runner`, also the CPU's) and V2 (`gpu/model_runner`). Both know on the host, before
each forward, the order of the batch and three numbers of each request; `mixquant.phase.plan` turns them into phases.
Wrapped here:

    execute_model                    marks a real step, notes which new requests are read precisely (short_prompts.py),
                                     and forgets the step afterwards
    V1 _prepare_inputs               the plan, once the batch has its order
    V2 update_requests               how many rows of each phase the step has (V2 picks a graph before it sorts)
    V2 prepare_inputs                the plan, once the batch has its order

and, by `graphs.py`, what picks and captures the step's CUDA graph. `HOOKS` is all of it.

The prompt's length is the request's own: V2's `prefill_len` counts recomputed answers after a preemption, V1's
`is_prefilling` marks whole requests.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mixquant.integrations.vllm import graphs
from mixquant.integrations.vllm.hooks import Original, PhaseMethod, wrap
from mixquant.integrations.vllm.step import StepState
from mixquant.phase import count_rows, plan


def _v1_execute_model(
    method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    with _step(method.state, scheduler_output):
        return original(scheduler_output, *args, **kwargs)


def _v2_execute_model(
    method: PhaseMethod, runner: Any, original: Original, scheduler_output: Any, *args: Any, **kwargs: Any
) -> Any:
    dummy = kwargs.get("dummy_run", args[1] if len(args) > 1 else False)
    with _step(method.state, None if dummy else scheduler_output):
        return original(scheduler_output, *args, **kwargs)


@contextmanager
def _step(state: StepState, scheduled: Any) -> Iterator[None]:
    """Around a step; one of nothing scheduled is a dummy run."""
    state.live = scheduled is not None
    if scheduled is not None:
        state.short.follow(scheduled)
    try:
        yield
    finally:
        state.end()


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


V1 = "vllm.v1.worker.gpu_model_runner"
V2 = "vllm.v1.worker.gpu.model_runner"

HOOKS: dict[tuple[str, str, str], Callable[..., Any]] = {
    (V1, "GPUModelRunner", "execute_model"): _v1_execute_model,
    (V1, "GPUModelRunner", "_prepare_inputs"): _v1_prepare_inputs,
    (V1, "GPUModelRunner", "_warmup_and_capture"): graphs.v1_warmup_and_capture,
    (V1, "GPUModelRunner", "profile_cudagraph_memory"): graphs.v1_profile_cudagraph_memory,
    (graphs.DISPATCHER, "CudagraphDispatcher", "dispatch"): graphs.v1_dispatch,
    (graphs.DISPATCHER, "CudagraphDispatcher", "get_capture_descs"): graphs.v1_get_capture_descs,
    (V2, "GPUModelRunner", "execute_model"): _v2_execute_model,
    (V2, "GPUModelRunner", "update_requests"): _v2_update_requests,
    (V2, "GPUModelRunner", "prepare_inputs"): _v2_prepare_inputs,
    (graphs.MANAGER, "CudaGraphManager", "dispatch"): graphs.v2_dispatch,
    (graphs.MANAGER, "CudaGraphManager", "capture"): graphs.v2_capture,
    (graphs.MANAGER, "CudaGraphManager", "run_pw_graph"): graphs.v2_run_pw_graph,
}
"""What stands in for each function of vLLM's, by module, class and name."""


def install() -> None:
    """Wrap the runners that this worker has loaded; calling it again changes nothing.

    Raises InputError where a name is missing: another vLLM than the supported ones.
    """
    for (module, owner, name), around in HOOKS.items():
        if module in sys.modules:
            wrap(getattr(sys.modules[module], owner, None), name, around)
