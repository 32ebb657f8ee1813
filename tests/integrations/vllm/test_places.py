"""Graphs with 64, 128, 256 and 512 precise rows: which are captured, which a step takes, and that each row in them
gets the product of its phase, in vLLM's own managers of both runners.

That graphs replay as they should is measured on a GPU (benchmarks/vllm_graphs.py).
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.forward_context import BatchDescriptor

from mixquant.errors import InputError
from mixquant.integrations.vllm import config as method
from mixquant.integrations.vllm import runner
from mixquant.integrations.vllm.places import PLACES, WIDE_SIZES, Graphs, graphs_for, placed, places_of
from mixquant.integrations.vllm.step import StepState
from mixquant.phase import RowCounts, plan
from tests.integrations.vllm.dispatchers import (
    CPU,
    VLLM_SIZES,
    gpu_config,
    taken_by_v1,
    taken_by_v2,
    v1_dispatcher,
    v2_manager,
)
from tests.integrations.vllm.engines import CONTROL, EXACT
from tests.integrations.vllm.recorder import by_phase, captured, run_step

WIDE = (512, 768, 1024, 1280, 1536, 1792, 2048)
ADDED = {128: (192, 256, 384, *WIDE), 256: (384, *WIDE), 512: WIDE[1:]}
"""Places and rows of the graphs that an engine of many requests captures more than vLLM's 57."""


def step(decoding: int, prompt: int) -> tuple[list[int], list[int], list[int], int]:
    """A prompt's rows between those of conversations: what `plan` takes. One row is its tail."""
    before, after = decoding // 3, decoding - decoding // 3
    lengths = [9] * before + [prompt] + [9] * after
    computed = [20] * before + [0] + [20] * after
    return lengths, computed, [1] * before + [prompt] + [1] * after, 1


@pytest.fixture(scope="module")
def config(folder: Any) -> Any:
    made = gpu_config(folder, max_num_seqs=1024)
    made.quant_config.state.buffers(CPU)  # not by the first recording: in inference mode, where a runner's steps stay
    return made


@pytest.mark.parametrize(("seqs", "places", "count"), [(64, (), 0), (256, (128, 256), 18), (257, PLACES[1:], 24)])
def test_the_graphs_that_are_added(folder: Any, seqs: int, places: tuple[int, ...], count: int) -> None:
    """Only those that a step can need: of so many requests each has one precise row."""
    made = gpu_config(folder, max_num_seqs=seqs)
    graphs = graphs_for(made, made.compilation_config.cudagraph_capture_sizes, tail=1)
    assert graphs.rows == {each: ADDED[each] for each in places}
    assert sum(map(len, graphs.rows.values())) == count
    assert all(rows > each for each, wider in graphs.rows.items() for rows in wider)


WIDER = {4: [16, 32, 64, 96, 128], 5: [16, 32, 64, 96, 128], 64: [192, 256], 128: [320, 384], 1024: [768, 1024]}
"""By requests at once: the first sizes beyond vLLM's own."""


@pytest.mark.parametrize("seqs", WIDER)
def test_steps_of_up_to_2048_rows_are_captured_however_few_requests_run(folder: Any, seqs: int) -> None:
    sizes = gpu_config(folder, max_num_seqs=seqs).compilation_config.cudagraph_capture_sizes
    own = min(2 * seqs // 8 * 8, 512)
    assert [size for size in sizes if size > own][: len(WIDER[seqs])] == WIDER[seqs]
    assert set(VLLM_SIZES[:3]) <= set(sizes) <= {seqs, *VLLM_SIZES, *WIDE_SIZES}
    assert sizes[-1] == 2048


QWEN3_30B_A3B, GLM_45_AIR = (
    SimpleNamespace(experts_per_token=8, hidden_dim=hidden, intermediate_size_per_partition=inner)
    for hidden, inner in ((2048, 768), (4096, 1408))
)


def with_experts(folder: Any, moe: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The configuration of an engine that has built a layer of these experts."""
    monkeypatch.setattr(method, "PhaseMoEMethod", lambda *args: None)
    made = gpu_config(folder, max_num_seqs=256, **options)
    with set_current_vllm_config(made):
        made.quant_config._experts_method(SimpleNamespace(moe_config=moe), "model.layers.0.mlp.experts")
    return made


def test_steps_that_small_experts_keep_waiting_for_the_host_are_captured(
    folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: with large experts they are not, nor where somebody has set a limit"""
    small, large = (v1_dispatcher(with_experts(folder, moe, monkeypatch)) for moe in (QWEN3_30B_A3B, GLM_45_AIR))
    sizes = [made.vllm_config.compilation_config.cudagraph_capture_sizes for made in (small, large)]
    assert [sizes[0][-7:], sizes[1][-1]] == [[2048, 2560, 3072, 3584, 4096, 4608, 5120], 2048]
    few, many = RowCounts(prefill=4000, decode=1), RowCounts(prefill=4000, decode=65)
    pure, long = RowCounts(prefill=4096, decode=0), RowCounts(prefill=5121, decode=1)
    steps = few, many, pure, long
    assert [taken_by_v1(small, rows) for rows in steps] == [(4096, 64), (4096, 128), (4096, 64), None]
    assert [taken_by_v1(large, rows) for rows in steps] == [None] * 4
    limited = with_experts(folder, QWEN3_30B_A3B, monkeypatch, sizes=(1, 2, 4, 8, 256))
    assert limited.compilation_config.cudagraph_capture_sizes[-1] == 256


def test_a_limit_that_somebody_has_set_stays(folder: Any) -> None:
    made = gpu_config(folder, (1, 2, 4, 8, 256), max_num_seqs=1024)
    assert made.compilation_config.cudagraph_capture_sizes == [1, 2, 4, 8, 256]
    made = gpu_config(folder, max_num_seqs=1024, max_num_batched_tokens=1500)
    assert made.compilation_config.cudagraph_capture_sizes[-3:] == [768, 1024, 1280]


def test_tails_and_drafts_count(folder: Any) -> None:
    made = gpu_config(folder, max_num_seqs=64)
    assert list(graphs_for(made, VLLM_SIZES, tail=4).rows) == [128, 256]  # 512 rows: none of more than these


def test_ranks_that_agree_on_rows_have_none(config: Any) -> None:
    ranks = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=2))
    assert graphs_for(ranks, VLLM_SIZES, tail=1) == Graphs()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ((), {}),
        ((1, 64, 150), {}),
        ((1, 200, 500), {128: (200, 500), 256: (500,)}),
        ((700,), {128: (700,), 256: (700,), 512: (700,)}),
    ],
)
def test_other_sizes_of_graphs(sizes: tuple[int, ...], rows: dict[int, tuple[int, ...]]) -> None:
    assert Graphs.make(sizes, 1024).rows == rows


def test_however_many_sizes_the_added_are_few() -> None:
    assert sum(map(len, Graphs.make(range(1, 2049), 9999).rows.values())) <= 27


def test_a_descriptor_of_other_places_names_another_graph() -> None:
    own = BatchDescriptor(256, has_lora=True)
    wider = placed(own, 128)
    assert placed(own, 64) is own
    assert wider == placed(BatchDescriptor(256, has_lora=True), 128)
    assert {own: 1, wider: 2, placed(own, 256): 3} == {own: 1, placed(own, 128): 2, placed(own, 256): 3}
    assert (wider.num_tokens, wider.has_lora, places_of(wider), places_of(own)) == (256, True, 128, 64)
    assert len({own, wider, placed(own, 256)}) == 3


CHOICES = [
    (RowCounts(prefill=511, decode=2), (768, 64)),
    (RowCounts(prefill=511, decode=64), (768, 64)),
    (RowCounts(prefill=511, decode=65), (768, 128)),
    (RowCounts(prefill=511, decode=128), (768, 128)),
    (RowCounts(prefill=511, decode=129), (768, 256)),
    (RowCounts(prefill=511, decode=256), (768, 256)),
    (RowCounts(prefill=511, decode=257), (768, 512)),
    (RowCounts(prefill=511, decode=512), (1024, 512)),
    (RowCounts(prefill=511, decode=513), None),
    (RowCounts(prefill=1, decode=64), (72, 64)),
    (RowCounts(prefill=1, decode=65), (192, 128)),  # only there has a graph so many places
    (RowCounts(prefill=100, decode=128), (256, 128)),
    (RowCounts(prefill=1, decode=256), (384, 256)),
    (RowCounts(prefill=1, decode=257), (768, 512)),
    (RowCounts(prefill=1700, decode=65), (1792, 128)),
    (RowCounts(prefill=2000, decode=65), None),
    (RowCounts(prefill=500, decode=0), (512, 64)),
]
"""Rows of a step, and rows and places of the graph that it takes; None: none."""


@pytest.fixture(scope="module")
def dispatcher(config: Any) -> Any:
    return v1_dispatcher(config)


@pytest.mark.parametrize(("rows", "graph"), CHOICES)
def test_the_graph_that_v1_takes(dispatcher: Any, rows: RowCounts, graph: tuple[int, int] | None) -> None:
    assert taken_by_v1(dispatcher, rows) == graph


@pytest.mark.parametrize(("rows", "graph"), CHOICES)
def test_the_graph_that_v2_takes(config: Any, monkeypatch: Any, rows: RowCounts, graph: tuple[int, int] | None) -> None:
    assert taken_by_v2(v2_manager(config, monkeypatch), rows, rows.decode + 1) == graph


def test_control_a_manager_without_added_graphs_runs_65_rows_uncaptured(config: Any, monkeypatch: Any) -> None:
    manager, state = v2_manager(config, monkeypatch), config.quant_config.state
    manager.mixquant_graphs = Graphs()
    state.live, state.rows = True, RowCounts(prefill=511, decode=65)
    try:
        assert manager.dispatch(66, 576, None, 0).cg_mode is CUDAGraphMode.NONE
    finally:
        state.end()


def expected(config: Any) -> list[tuple[int, int]]:
    """Rows and places of all piecewise graphs, in the order of their capture."""
    own = config.compilation_config.cudagraph_capture_sizes
    added = [(rows, places) for places, wider in ADDED.items() for rows in wider]
    return sorted([*((rows, 64) for rows in own), *added], reverse=True)


def test_v1_captures_vllms_graphs_and_the_added_ones(config: Any, dispatcher: Any, monkeypatch: Any) -> None:
    """Each warm-up and each recording knows its places, and the recording's key is the one that steps ask for."""
    from vllm.v1.worker import gpu_model_runner

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    runner.install()
    state, found = config.quant_config.state, dict(dispatcher.get_capture_descs())
    piecewise = found[CUDAGraphMode.PIECEWISE]
    assert [(each.num_tokens, places_of(each)) for each in piecewise] == expected(config)
    assert {places_of(each) for each in found[CUDAGraphMode.FULL]} == {64}
    ran: list[Any] = []

    def dummy_run(rows: int, cudagraph_runtime_mode: CUDAGraphMode, **_: Any) -> None:
        captures = cudagraph_runtime_mode is CUDAGraphMode.PIECEWISE
        ran.append(dispatcher.dispatch(rows, valid_modes=None if captures else {CUDAGraphMode.NONE})[1])
        ran.append(state.places)

    made = object.__new__(gpu_model_runner.GPUModelRunner)
    made.vllm_config, made.compilation_config, made._dummy_run = config, config.compilation_config, dummy_run
    for each in piecewise:
        ran.clear()
        made._warmup_and_capture(each, CUDAGraphMode.PIECEWISE, num_warmups=1)
        assert ran == [BatchDescriptor(each.num_tokens), places_of(each), each, places_of(each)]
    assert state.places == 64


def test_v2_captures_vllms_graphs_and_the_added_ones(config: Any, monkeypatch: Any) -> None:
    state, ran = config.quant_config.state, []
    manager = v2_manager(config, monkeypatch, lambda desc, mode: ran.append((mode, desc.num_tokens, state.places)))
    assert [each[1:] for each in ran if each[0] is CUDAGraphMode.PIECEWISE] == expected(config)
    assert [each[1:] for each in ran if each[0] is CUDAGraphMode.NONE] == expected(config)  # each warmed up as it is
    assert state.places == 64
    assert {places_of(each) for descs in manager._capture_descs.values() for each in descs} == {64}  # as vLLM left it


def test_a_draft_models_manager_captures_none(config: Any, monkeypatch: Any) -> None:
    from vllm.v1.worker.gpu import cudagraph_utils

    v2_manager(config, monkeypatch)  # makes a CPU look like a GPU
    manager = cudagraph_utils.CudaGraphManager(config, CPU, CUDAGraphMode.PIECEWISE, decode_query_len=1)
    captured: list[Any] = []
    manager.capture(lambda desc, warmup: lambda mode: captured.append(desc))
    assert len(captured) == 2 * len(config.compilation_config.cudagraph_capture_sizes)


def test_another_vllm_is_named_at_its_start(config: Any, monkeypatch: Any) -> None:
    manager = v2_manager(config, monkeypatch)
    del manager._capture_descs
    with pytest.raises(InputError, match=r"no CudaGraphManager\._capture_descs: install one of the versions"):
        type(manager).__mro__[1].capture(manager, lambda desc, warmup: lambda mode: None)


@pytest.fixture
def recorder(config: Any, monkeypatch: Any) -> Any:
    return captured(config, monkeypatch)


STEPS = [(1, 64), (32, 64), (63, 64), (64, 128), (65, 128), (127, 128), (128, 256), (255, 256), (256, 512), (511, 512)]
"""Conversations beside a prompt, whose tail is one precise row more, and the places of their graph."""


def test_each_row_by_its_phase_whatever_came_before(recorder: Any) -> None:
    made, manager = recorder
    state = made.routed.state
    assert len(made.recorded) == len(expected(made.config))
    for decoding, places in STEPS * 2:
        requests = step(decoding, prompt=100)
        x = torch.randn(100 + decoding, 64)
        out, graph = run_step(made, manager, requests, x)
        assert graph[1] == places
        torch.testing.assert_close(out, by_phase(made, plan(*requests), x), atol=EXACT, rtol=0)
        state.end()
        assert (int(state.gather.abs().sum()), int(state.scatter.abs().sum()), state.written) == (0, 0, 0)


@pytest.mark.parametrize(("decoding", "places"), [each for each in STEPS if each[1] > 64])
def test_control_a_graph_of_fewer_places_leaves_rows_quantized(recorder: Any, decoding: int, places: int) -> None:
    made, manager = recorder
    requests = step(decoding, prompt=100)
    x = torch.randn(100 + decoding, 64)
    run_step(made, manager, requests, x)
    made.routed.state.places = fewer = places // 2
    wrong, planned = made.routed.both(x, None), plan(*requests)
    made.routed.state.end()
    difference = (wrong - by_phase(made, planned, x)).abs().amax(1)[planned.decode_rows]
    assert difference[:fewer].max() <= EXACT
    assert difference[fewer:].min() > CONTROL


def test_a_graph_never_holds_fewer_rows_than_are_written(config: Any) -> None:
    state = StepState(tail=1)
    state.buffers(CPU)
    state.replay(64)
    with pytest.raises(AssertionError):
        state.begin(plan(*step(64, prompt=10)), CPU)


def test_a_dummy_step_of_one_row_reads_nothing_stale(recorder: Any) -> None:
    made, manager = recorder
    run_step(made, manager, step(400, prompt=100), torch.randn(500, 64))
    made.routed.state.end()
    assert made.routed.both(torch.randn(1, 64), None).shape == (1, 48)


def test_placed_descriptors_can_be_replaced() -> None:
    """As vLLM does with its own."""
    assert places_of(dataclasses.replace(placed(BatchDescriptor(8), 128), num_tokens=16)) == 128
