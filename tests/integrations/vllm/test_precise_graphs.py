"""Graphs of precise products only, which steps with short prompts take: which are captured, and who takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode

from mixquant.integrations.vllm.places import ALL, PLACES, PRECISE_STEPS, Graphs, graphs_for, places_of
from mixquant.integrations.vllm.step import Form, StepState
from mixquant.phase import WHOLE_PROMPT, RowCounts, plan
from tests.integrations.vllm.dispatchers import CPU, gpu_config, taken_by_v1, taken_by_v2, v1_dispatcher, v2_manager
from tests.integrations.vllm.engines import CONTROL, EXACT
from tests.integrations.vllm.recorder import by_phase, captured, run_step

MIN_PROMPT = 512


@pytest.fixture(scope="module")
def config(folder: Path) -> Any:
    made = gpu_config(folder, max_num_seqs=64)
    made.quant_config.state.short.min_prompt = MIN_PROMPT
    made.quant_config.state.buffers(CPU)
    return made


def test_few_graphs_are_added_and_none_without_short_prompts(config: Any) -> None:
    sizes = config.compilation_config.cudagraph_capture_sizes
    graphs = graphs_for(config, sizes, tail=1, min_prompt=MIN_PROMPT)
    assert graphs.rows[ALL] == PRECISE_STEPS
    assert list(graphs.rows) == [*PLACES[1:], ALL]  # a precise prompt beside a quantized one takes many places
    assert graphs_for(config, sizes, tail=1) == Graphs()
    assert Graphs.make((1, 64, 150), 64, short_prompts=True).rows == {ALL: (64, 150)}
    assert Graphs.make((), 64, short_prompts=True).rows == {}


CHOICES = [
    (RowCounts(prefill=0, decode=5, tail=5), (8, ALL)),
    (RowCounts(prefill=0, decode=65, tail=40), (96, ALL)),
    (RowCounts(prefill=0, decode=130, tail=128), (192, ALL)),
    (RowCounts(prefill=0, decode=255, tail=255), (256, ALL)),
    (RowCounts(prefill=0, decode=512, tail=448), (512, ALL)),
    (RowCounts(prefill=0, decode=513, tail=449), (768, ALL)),
    (RowCounts(prefill=0, decode=1025, tail=961), None),  # uncaptured, and precise all the same
    (RowCounts(prefill=1, decode=4), (8, 64)),
    (RowCounts(prefill=300, decode=130, tail=128), (512, 256)),
    (RowCounts(prefill=300, decode=512, tail=448), (1024, 512)),
    (RowCounts(prefill=300, decode=513, tail=449), None),
    (RowCounts(prefill=130, decode=0), (192, 64)),
]
"""Rows of a step that is no uniform decode, and rows and places of the graph that it takes; None: none."""


@pytest.fixture(scope="module")
def dispatcher(config: Any) -> Any:
    return v1_dispatcher(config)


@pytest.mark.parametrize(("rows", "graph"), CHOICES)
def test_the_graph_that_v1_takes(dispatcher: Any, rows: RowCounts, graph: tuple[int, int] | None) -> None:
    assert taken_by_v1(dispatcher, rows) == graph


@pytest.mark.parametrize(("rows", "graph"), CHOICES)
def test_the_graph_that_v2_takes(config: Any, monkeypatch: Any, rows: RowCounts, graph: tuple[int, int] | None) -> None:
    assert taken_by_v2(v2_manager(config, monkeypatch), rows, 3) == graph


def test_a_decode_step_keeps_its_full_graph(dispatcher: Any, monkeypatch: Any) -> None:
    """Also one that holds a short prompt's last row."""
    state = dispatcher.vllm_config.quant_config.state
    manager = v2_manager(dispatcher.vllm_config, monkeypatch)
    state.live, state.rows = True, RowCounts(prefill=0, decode=4, tail=1)
    try:
        assert dispatcher.dispatch(4, uniform_decode=True)[0] is CUDAGraphMode.FULL
        assert manager.dispatch(4, 4, 1, 0).cg_mode is CUDAGraphMode.FULL
    finally:
        state.end()


def test_control_without_min_prompt_quantized_products_run_in_vain(folder: Path) -> None:
    made = gpu_config(folder, max_num_seqs=257)
    state, dispatcher = made.quant_config.state, v1_dispatcher(made)
    state.live, state.rows = True, RowCounts(prefill=0, decode=130, tail=128)
    try:
        assert places_of(dispatcher.dispatch(130)[1]) == 256
    finally:
        state.end()


def test_the_form_of_their_recording() -> None:
    """And of the warm-up before it, which compiles kernels for the product's shape."""
    for places, mode, form in (
        (ALL, "PIECEWISE", Form.DECODE_GRAPH), (ALL, "NONE", Form.DECODE_GRAPH),
        (512, "PIECEWISE", Form.MIXED_GRAPH), (512, "NONE", Form.DUMMY),
    ):  # fmt: skip
        assert StepState(places=places, tail=1).form(CUDAGraphMode[mode], capturing=False) is form


Requests = tuple[list[int], list[int], list[int], list[int]]


def step(short: int, decoding: int, quantized: int) -> Requests:
    """A short prompt beside conversations, and a quantized prompt, if it has rows: the arguments of `plan`."""
    requests = [(short, 0, short, WHOLE_PROMPT), *[(9, 20, 1, 1)] * decoding]
    requests += [(quantized, 0, quantized, 1)] if quantized else []
    lengths, computed, scheduled, tails = (list(column) for column in zip(*requests, strict=True))
    return lengths, computed, scheduled, tails


STEPS = [
    (5, 0, 0, ALL), (100, 3, 0, ALL), (5, 2, 40, 64), (100, 3, 0, ALL), (70, 3, 300, 128), (200, 40, 300, 256),
    (255, 63, 0, ALL), (30, 0, 9, 64), (1, 0, 0, ALL),
]  # fmt: skip
"""Rows of a short prompt, of conversations and of a quantized prompt, and the places of the graph of such a step."""


def test_each_row_by_its_phase_whatever_came_before(config: Any, monkeypatch: Any) -> None:
    made, manager = captured(config, monkeypatch)
    state = made.routed.state
    for short, decoding, quantized, places in STEPS * 2:
        requests = step(short, decoding, quantized)
        planned = plan(*requests)
        x = torch.randn(planned.rows, 64)
        out, graph = run_step(made, manager, requests, x)
        assert graph[1] == places
        torch.testing.assert_close(out, by_phase(made, planned, x), atol=EXACT, rtol=0)
        state.end()
        assert (int(state.gather.abs().sum()), int(state.scatter.abs().sum()), state.written) == (0, 0, 0)


def test_control_the_other_graphs_leave_a_short_prompt_quantized(config: Any, monkeypatch: Any) -> None:
    made, manager = captured(config, monkeypatch)
    requests = step(short=100, decoding=3, quantized=0)
    x = torch.randn(103, 64)
    run_step(made, manager, requests, x)
    made.routed.state.end()
    wrong = made.routed.both(x, None)
    assert (wrong - by_phase(made, plan(*requests), x)).abs().amax(1)[1:].min() > CONTROL
