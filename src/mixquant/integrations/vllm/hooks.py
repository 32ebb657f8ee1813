"""How a function of vLLM's is wrapped: for engines whose quantization method is ours, and for no others.

`runner.py` wraps the model runners, `graphs.py` what captures and picks CUDA graphs, `stores.py` the engine core.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

from mixquant.errors import InputError
from mixquant.integrations.vllm.counters import RowCounters
from mixquant.integrations.vllm.graph_memory import GraphMemory
from mixquant.integrations.vllm.step import StepState

Original = Callable[..., Any]
"""The wrapped function, bound to its object."""


class PhaseMethod(Protocol):
    """What hooks use of an engine's quantization method, where it is ours (`config.PhaseConfig`)."""

    state: StepState
    counters: RowCounters
    profiled: GraphMemory | None


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

    Told by what it holds: config.py imports the hooks, so they cannot know its class.
    """
    method: PhaseMethod | None = owner.vllm_config.quant_config
    return method if isinstance(getattr(method, "state", None), StepState) else None
