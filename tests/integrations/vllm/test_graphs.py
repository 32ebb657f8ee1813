"""CUDA graphs without a GPU: the form of a layer that a graph holds, and which graphs vLLM's dispatchers may choose.

That graphs replay as they should is measured on a GPU (benchmarks/vllm_graphs.py).
"""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from mixquant.errors import InputError
from mixquant.formats import quantizer
from mixquant.integrations.vllm.places import PLACES
from mixquant.integrations.vllm.routed import RoutedLinear
from mixquant.integrations.vllm.step import PURE_ROWS, Form, StepState
from mixquant.kernels.dense import Dense
from mixquant.kernels.emulation import EmulatedNVFP4
from mixquant.phase import DECODE_ONLY, Plan, RowCounts, plan
from tests.integrations.vllm.dispatchers import CPU, FEW_SIZES, gpu_config, v1_dispatcher, v2_manager
from tests.integrations.vllm.engines import CONTROL, EXACT


@pytest.fixture
def routed() -> RoutedLinear:
    """A layer of both kernels whose graph form has its buffers."""
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    state = StepState(tail=1)
    state.buffers(CPU)
    return RoutedLinear(EmulatedNVFP4.from_weight(weight, quantizer("nvfp4")), Dense(weight), 48, state)


REAL, DUMMY, UNPLANNED = (DECODE_ONLY, True), (None, False), (None, True)
"""(plan, live): a step, a profiling or capturing run, and a step whose plan was never made."""

FORMS = [
    (REAL, "NONE", False, Form.PLANNED),
    (REAL, "FULL", False, Form.PLANNED),
    (REAL, "PIECEWISE", False, Form.MIXED_GRAPH),  # recorded in a real step, and replayed in others
    (REAL, "PIECEWISE", True, Form.MIXED_GRAPH),
    (DUMMY, "PIECEWISE", True, Form.MIXED_GRAPH),
    (DUMMY, "PIECEWISE", False, Form.MIXED_GRAPH),
    (DUMMY, "FULL", True, Form.DECODE_GRAPH),
    (DUMMY, "FULL", False, Form.DECODE_GRAPH),
    (DUMMY, "NONE", True, Form.DECODE_GRAPH),  # V2 records full graphs under no mode
    (DUMMY, "NONE", False, Form.DUMMY),
    (UNPLANNED, "PIECEWISE", False, Form.MIXED_GRAPH),
]
"""What runs, the graph mode of its forward, whether the stream is captured, and the form of the layers."""


@pytest.mark.parametrize(("runs", "mode", "capturing", "form"), FORMS)
def test_the_form_of_a_forward(runs: tuple[Plan | None, bool], mode: str, capturing: bool, form: Form) -> None:
    made, live = runs
    assert StepState(plan=made, live=live, tail=1).form(CUDAGraphMode[mode], capturing) is form


@pytest.mark.parametrize("mode", ["NONE", "FULL"])
def test_a_step_without_a_plan_has_no_form(mode: str) -> None:
    with pytest.raises(InputError, match="in a step without a plan: report this vLLM version"):
        StepState(live=True, tail=1).form(CUDAGraphMode[mode], capturing=False)


def batches(count: int) -> list[Plan]:
    """Plans of random batches that a graph can hold: decodes, prompt chunks and tails in any order."""
    random, made = Random(0), []
    while len(made) < count:
        requests = [(random.randint(1, 60), random.randint(0, 70), random.randint(1, 30)) for _ in range(5)]
        lengths, computed, scheduled = zip(*requests, strict=True)
        made.append(plan(lengths, computed, scheduled, tail=random.randint(0, 3)))
    return [each for each in made if len(each.decode_rows) <= PLACES[0]]


def run_graph(routed: RoutedLinear, step: Plan, x: torch.Tensor, padded: int) -> torch.Tensor:
    """The graph form's rows of a step, in a graph of `padded` rows."""
    routed.state.replay(PLACES[0])
    routed.state.begin(step, CPU)
    rows = torch.cat([x, torch.randn(padded - len(x), x.shape[1])])
    return routed.both(rows, None)[: len(x)]


def test_a_graph_computes_each_row_by_its_phase(routed: RoutedLinear) -> None:
    for step in batches(40):
        x = torch.randn(step.rows, 64)
        expected = routed.prefill(x, None)
        expected[step.decode_rows] = routed.decode(x, None)[step.decode_rows]
        torch.testing.assert_close(run_graph(routed, step, x, step.rows + 7), expected, atol=EXACT, rtol=0)
        routed.state.end()


def test_control_a_graph_without_its_rows_differs(routed: RoutedLinear) -> None:
    step = plan([20, 9], [0, 9], [20, 1], tail=1)
    x = torch.randn(step.rows, 64)
    right = run_graph(routed, step, x, 24)
    routed.state.end()
    wrong = routed.both(x, None)
    difference = (right - wrong).abs().amax(1)
    assert difference[step.decode_rows].min() > CONTROL
    assert difference[:19].max() <= EXACT


def test_nothing_stale_is_left_for_a_shorter_step(routed: RoutedLinear) -> None:
    """A data-parallel rank without work replays the graph of one row: no index may point beyond it."""
    step = plan([50], [0], [50], tail=1)
    run_graph(routed, step, torch.randn(50, 64), 56)
    assert routed.state.gather is not None
    assert int(routed.state.gather.max()) == 49
    routed.state.end()
    assert int(routed.state.gather.max()) == 0
    assert routed.both(torch.randn(1, 64), None).shape == (1, 48)


STEPS = [
    (RowCounts(prefill=0, decode=4), True, "FULL"),
    (RowCounts(prefill=1, decode=0), True, "PIECEWISE"),  # a prompt chunk of one row looks like a decode step
    (RowCounts(prefill=3, decode=1), True, "PIECEWISE"),
    (RowCounts(prefill=99, decode=1), False, "PIECEWISE"),
    (RowCounts(prefill=1900, decode=2), False, "PIECEWISE"),
    (RowCounts(prefill=200, decode=PLACES[0]), False, "PIECEWISE"),
    (RowCounts(prefill=200, decode=PLACES[-1]), False, "PIECEWISE"),
    (RowCounts(prefill=200, decode=PLACES[-1] + 1), False, "NONE"),
    (RowCounts(prefill=PURE_ROWS, decode=0), False, "PIECEWISE"),
    (RowCounts(prefill=PURE_ROWS + 1, decode=0), False, "NONE"),
    (RowCounts(prefill=2048, decode=1), False, "NONE"),
]
"""Rows of a step, whether it looks like a decode step, and the graph it may replay."""


@pytest.fixture(scope="module")
def dispatcher(folder: Any) -> Any:
    return v1_dispatcher(gpu_config(folder, FEW_SIZES, max_num_seqs=512, max_num_batched_tokens=4096))


@pytest.mark.parametrize(("rows", "uniform", "mode"), STEPS)
def test_the_graph_that_a_step_may_replay(dispatcher: Any, rows: RowCounts, uniform: bool, mode: str) -> None:
    state = dispatcher.vllm_config.quant_config.state
    state.live, state.rows = True, rows
    try:
        chosen, _ = dispatcher.dispatch(rows.prefill + rows.decode, uniform_decode=uniform)
        assert chosen.name == mode
        assert state.piecewise == (mode == "PIECEWISE")
    finally:
        state.end()


def test_control_vllm_alone_replays_a_decode_graph_for_a_prompt(dispatcher: Any) -> None:
    """What the wrapper prevents: without a step's phases, one row is a decode step."""
    assert dispatcher.dispatch(1, uniform_decode=True)[0].name == "FULL"


@pytest.fixture
def manager(dispatcher: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    return v2_manager(dispatcher.vllm_config, monkeypatch)


@pytest.mark.parametrize(("rows", "uniform", "mode"), STEPS)
def test_the_graph_that_v2_may_replay(manager: Any, rows: RowCounts, uniform: bool, mode: str) -> None:
    state = manager.vllm_config.quant_config.state
    state.live, state.rows = True, rows
    count = rows.prefill + rows.decode
    try:
        chosen = manager.dispatch(count if uniform else 2, count, 1 if uniform else None, 0)
        assert chosen.cg_mode.name == mode
        assert chosen.num_tokens == count or mode != "NONE"
        assert state.piecewise == (mode == "PIECEWISE")
    finally:
        state.end()


def test_control_v2_alone_replays_a_decode_graph_for_a_prompt(manager: Any) -> None:
    assert manager.dispatch(1, 1, 1, 0).cg_mode.name == "FULL"
