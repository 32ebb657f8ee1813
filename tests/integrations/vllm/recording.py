"""What really ran: every step's batch, and what each routed layer was given.

`start` and `stop` run in the engine's workers (`llm.collective_rpc`), whatever process they are in. They watch two
functions of the plugin and change nothing: the one that plans a step, and the routed layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

V1 = "vllm.v1.worker.cpu_model_runner"
V2 = "vllm.v1.worker.cpu.model_runner"
"""Modules of vLLM's two model runners on CPUs."""

LayerInputs = dict[str, Tensor]
"""Input of each routed layer by name, in order of execution."""


@dataclass
class Step:
    """One step: three numbers of each request in batch order, and the layers' inputs, [rows, K] in that order."""

    lengths: list[int]
    computed: list[int]
    scheduled: list[int]
    inputs: LayerInputs = field(default_factory=dict)

    @property
    def requests(self) -> Iterator[tuple[int, int, int]]:
        """(prompt length, computed, scheduled) of each."""
        return zip(self.lengths, self.computed, self.scheduled, strict=True)


class _Recorder:
    """Watches the plugin in this process until it is stopped."""

    def __init__(self) -> None:
        from mixquant.integrations.vllm import routed, runner

        self.steps: list[Step] = []
        plan, call = runner.plan, routed.RoutedLinear.__call__
        self.originals = ((runner, "plan", plan), (routed.RoutedLinear, "__call__", call))

        def watch_plan(lengths: list[int], computed: list[int], scheduled: list[int], tail: int) -> Any:
            self.steps.append(Step(list(lengths), list(computed), list(scheduled)))
            return plan(lengths, computed, scheduled, tail)

        def watch_call(layer: Any, x: Any, bias: Tensor | None) -> Tensor:
            if layer.state.plan is not None:  # a real step, and not a warm-up
                self.steps[-1].inputs[_name(layer)] = getattr(x, "x", x).clone()  # experts: rows with their routing
            return call(layer, x, bias)

        runner.plan, routed.RoutedLinear.__call__ = watch_plan, watch_call

    def stop(self) -> list[Step]:
        for owner, name, original in self.originals:
            setattr(owner, name, original)
        return self.steps


_recorders: list[_Recorder] = []


def start(worker: object = None) -> None:
    _recorders.append(_Recorder())


def stop(worker: object = None) -> list[Step]:
    return _recorders.pop().stop()


def runner(worker: Any) -> str:
    """The module of the worker's model runner: V1's or V2's."""
    return type(worker.model_runner).__module__


def _name(routed: Any) -> str:
    from vllm.forward_context import get_forward_context

    layers = get_forward_context().no_compile_layers
    return next(name.rpartition(":")[2] for name, layer in layers.items() if layer is routed)


def merge(workers: Sequence[Sequence[Step]]) -> list[Step]:
    """One list of steps from all workers': layers of pipeline stages joined, shards of tensor parallelism too."""
    return [
        Step(same[0].lengths, same[0].computed, same[0].scheduled, _merge_inputs([step.inputs for step in same]))
        for same in zip(*workers, strict=True)
    ]


def _merge_inputs(ranks: Sequence[LayerInputs]) -> LayerInputs:
    names = dict.fromkeys(name for inputs in ranks for name in inputs)
    return {name: _join([inputs[name] for inputs in ranks if name in inputs]) for name in names}


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Shards along K; a layer that is sharded along N has the same whole input on each rank."""
    whole = all(torch.equal(parts[0], part) for part in parts)
    return parts[0] if whole else torch.cat(list(parts), 1)


def prompt_inputs(steps: Sequence[Step], length: int) -> LayerInputs:
    """The layers' inputs for the prompt of this length, [length, K] by position; NaN where the cache saved the work.

    Prompts of a batch are told apart by their lengths.
    """
    found: LayerInputs = {}
    for step in steps:
        start = 0
        for prompt_len, computed, scheduled in step.requests:
            stop = min(computed + scheduled, length)
            if prompt_len == length and computed < stop:
                for name, rows in step.inputs.items():
                    table = found.setdefault(name, rows.new_full((length, rows.shape[1]), torch.nan))
                    table[computed:stop] = rows[start : start + stop - computed]
            start += scheduled
    return found
