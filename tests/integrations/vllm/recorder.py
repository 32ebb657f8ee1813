"""A model of one layer whose piecewise graphs are recorded and replayed on a CPU, under vLLM's own V2 manager."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, get_forward_context, set_forward_context

from mixquant.formats import quantizer
from mixquant.integrations.vllm.routed import RoutedLinear
from mixquant.integrations.vllm.step import StepState
from mixquant.kernels.dense import Dense
from mixquant.kernels.emulation import EmulatedNVFP4
from mixquant.phase import Plan, count_rows, plan
from tests.integrations.vllm.dispatchers import CPU, v2_manager


def layer(state: StepState) -> RoutedLinear[torch.Tensor]:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    return RoutedLinear(EmulatedNVFP4.from_weight(weight, quantizer("nvfp4")), Dense(weight), 48, state)


class Recorder:
    """What torch.compile's pieces are to a runner: a model whose graphs are keyed as vLLM's CUDAGraphWrapper keys them.

    What a layer decides while it is recorded stays so in the graph; what is in the state's buffers is read anew.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.routed = layer(config.quant_config.state)
        self.recorded: dict[BatchDescriptor, int] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        state, context = self.routed.state, get_forward_context()
        if context.cudagraph_runtime_mode is not CUDAGraphMode.PIECEWISE:
            return self.routed(x, None)
        asked = state.places
        if context.batch_descriptor not in self.recorded:
            assert state.plan is None  # a step would record while it is served
            self.recorded[context.batch_descriptor] = asked
        state.places = self.recorded[context.batch_descriptor]
        try:
            return self.routed(x, None)
        finally:
            state.places = asked

    def run(self, manager: Any, rows: int, mode: CUDAGraphMode, x: torch.Tensor) -> torch.Tensor:
        """As both `ModelCudaGraphManager.capture` and `GPUModelRunner.execute_model` run a model."""
        key = BatchDescriptor(num_tokens=rows)
        with set_forward_context(None, self.config, rows, cudagraph_runtime_mode=mode, batch_descriptor=key):
            piecewise = mode is CUDAGraphMode.PIECEWISE
            out: torch.Tensor = manager.run_pw_graph(self, {"x": x}) if piecewise else self(x)
        return out


def captured(config: Any, monkeypatch: Any) -> tuple[Recorder, Any]:
    """A model and the V2 manager that has captured it."""
    made = Recorder(config)
    bare = v2_manager(config, monkeypatch)
    manager = v2_manager(
        config, monkeypatch, lambda desc, mode: made.run(bare, desc.num_tokens, mode, torch.zeros(desc.num_tokens, 64))
    )
    return made, manager


def run_step(made: Recorder, manager: Any, requests: Any, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """A step as V2 runs it, without `end`: its rows, and rows and places of the graph that computed them.

    requests: the arguments of `plan`.
    """
    state = made.routed.state
    planned = plan(*requests)
    state.live, state.rows = True, count_rows(*requests)
    chosen = manager.dispatch(len(requests[0]), planned.rows, None, 0)
    state.begin(planned, CPU)
    rows = torch.cat([x, torch.randn(chosen.num_tokens - len(x), 64)])
    out = made.run(manager, chosen.num_tokens, chosen.cg_mode, rows)[: len(x)]
    return out, (chosen.num_tokens, state.places)


def by_phase(made: Recorder, planned: Plan, x: torch.Tensor) -> torch.Tensor:
    out = made.routed.prefill(x, None)
    out[planned.decode_rows] = made.routed.decode(x, None)[planned.decode_rows]
    return out
