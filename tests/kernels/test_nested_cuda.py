"""The CUDA kernels of nested weights, as far as no GPU is needed: what lies where, which kernel takes how many rows,
and that the source compiles for every architecture without spilling a register. `test_cuda` multiplies, on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mixquant.errors import InputError
from mixquant.formats import nested
from mixquant.formats.nested import NestedTensor
from mixquant.kernels import nested_cuda, nested_split, nvrtc
from tests.formats.inputs import gaussian
from tests.kernels import nested_layout

N, K = 32, 128


def split(seed: int = 0) -> NestedTensor:
    return nested.split((gaussian(N, K, seed) * 0.02).bfloat16())


def test_each_thread_finds_its_nibbles() -> None:
    weight = split()
    packed = nested_layout.interleave(weight.nibbles)
    single = torch.stack([weight.nibbles & 15, weight.nibbles >> 4], -1).flatten(-2)
    for row, column in [(0, 0), (7, 19), (8, 5), (13, 63), (21, 64), (31, 127)]:
        thread = row % 8 * 4 + (column % 64 // 16 ^ row % 8 // 2)
        word, byte = column % 8 // 2, column % 16 // 8 * 2 + column % 2
        held = int(packed[column // 64, row // 16, thread, word * 4 + byte])
        assert held >> (row % 16 // 8 * 4) & 15 == single[row, column]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiler_sees_one_op() -> None:
    """Traced only, as a compiled decode step traces it: no kernel is launched."""
    kernel = object.__new__(nested_cuda.NestedCUDA)
    kernel.plane, kernel.nibbles, kernel.scales = (torch.zeros(N, K), torch.zeros(1), torch.zeros(N))
    kernel.escapes = kernel.more = torch.zeros(1)
    called: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., tuple[torch.Tensor]]:
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        (shape,) = [node.meta["example_value"].shape for node in graph.graph.nodes if node.target in called]
        return lambda *_: (torch.zeros(shape),)

    out = torch.compile(lambda x: kernel(x, None), backend=backend, fullgraph=True)(torch.zeros(3, K))
    assert [str(target) for target in called] == ["mixquant.nested_linear.default"]
    assert out.shape == (3, N)


def test_interleaving_loses_nothing() -> None:
    counts = [torch.bincount(x.flatten().int(), minlength=256) for x in _nibbles(split())]
    assert torch.equal(*counts)


def _nibbles(weight: NestedTensor) -> list[torch.Tensor]:
    both = (weight.nibbles, nested_layout.interleave(weight.nibbles))
    return [torch.stack([x & 15, x >> 4], -1) for x in both]


@pytest.mark.parametrize("small", [0, 1, 3, 4, 9])
def test_a_block_s_first_three_escapes_travel_with_it_and_the_others_follow(small: int) -> None:
    dense = (gaussian(N, K) * 0.02).bfloat16()
    dense.abs_().clamp_(min=0.01)  # no escape but ours
    dense[17, :small] = 1.0078125 * 2.0**-24
    weight = nested.split(dense)
    table, more = nested_layout.escapes_by_block(weight)
    counts = (table[:, 0] & 0x7FF).tolist()
    assert counts == [0, small, 0, 0]  # blocks by columns, then by tile
    found = [*table[1, 1 : 1 + min(small, 3)].tolist(), *more[int(table[1, 0]) >> 11 :].tolist()]
    scale = float(weight.scales[17]) * nested_cuda.LIFT
    assert [(e >> 20, e >> 16 & 15) for e in found] == [(column, 1) for column in range(small)]
    values = torch.tensor([e & 0xFFFF for e in found], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert (values.double() * scale).tolist() == dense[17, :small].double().tolist()


def test_laying_a_weight_out_takes_no_temporary_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels leave to torch: so a model loads in the memory of its BF16 weights and a little."""
    monkeypatch.setattr(nvrtc, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(nvrtc, "load", lambda *arguments: SimpleNamespace(launch=lambda *arguments: None))
    dense = (gaussian(2048, 2048) * 0.02).bfloat16()
    held, peak = memory_of(lambda: nested_split.split(dense))
    assert held == pytest.approx(dense.nbytes * 0.75, rel=0.03)
    assert peak < held + dense.nbytes // 64
    _, control = memory_of(lambda: dense.float())
    assert control == dense.nbytes * 2


def test_the_reference_takes_little_memory_however_large_the_weight_is() -> None:
    taken = {}
    for n in (2048, 4096):
        dense = (gaussian(n, 2048) * 0.02).bfloat16()
        held, peak = memory_of(lambda dense=dense: nested.split(dense))  # type: ignore[misc]
        assert held == pytest.approx(dense.nbytes * 0.75, rel=0.03)
        taken[n] = peak - held
    assert taken[4096] < taken[2048] * 1.1
    assert taken[4096] < 20 << 20


def memory_of(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that the result of `work` takes, and the most that were taken meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    assert profiled.profiler is not None
    assert profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    taken = list(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    del result
    return taken[-1], max(taken)


@pytest.mark.parametrize(
    ("rows", "n", "kernel"),
    [
        (1, 4096, "few_rows<1, 1, 1, 16>"),
        (8, 24576, "few_rows<1, 1, 1, 8>"),
        (9, 4096, "few_rows<2, 1, 1, 12>"),
        (16, 24576, "many_rows<16, 3, 1, 9>"),
        (17, 4096, "many_rows<32, 3, 5, 8>"),
        (32, 6144, "many_rows<32, 2, 4, 6>"),
        (32, 7200, "many_rows<32, 3, 1, 8>"),
        (33, 4096, "many_rows<64, 3, 5, 7>"),
        (33, 6144, "many_rows<64, 3, 3, 7>"),
        (64, 24576, "many_rows<64, 3, 1, 7>"),
        (65, 4096, "many_rows<128, 3, 5, 5>"),
        (256, 4096, "many_rows<256, 2, 3, 5>"),
        (257, 4096, "many_rows<256, 2, 2, 5>"),
        (512, 24576, "many_rows<256, 2, 1, 5>"),
    ],
)
def test_the_kernel_follows_rows_and_shape(rows: int, n: int, kernel: str) -> None:
    launch = nested_cuda.plan(rows, n, "sm_90a", 132)
    assert launch is not None
    assert launch.kernel == kernel
    assert launch.kernel in nested_cuda.kernels("sm_90a")


def test_other_architectures_take_few_rows_for_longer() -> None:
    launch = nested_cuda.plan(32, 24576, "sm_89", 132)
    assert launch is not None
    assert launch.kernel == "few_rows<4, 2, 2, 2>"


@pytest.mark.parametrize(("rows", "architecture"), [(513, "sm_90a"), (33, "sm_89"), (33, "sm_120a")])
def test_more_rows_are_multiplied_by_the_join(rows: int, architecture: str) -> None:
    assert nested_cuda.plan(rows, 4096, architecture, 132) is None


@pytest.fixture
def compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVRTC takes from its cache, where it has one, has no remarks of ptxas."""
    monkeypatch.setenv("CUDA_CACHE_DISABLE", "1")


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"])
def test_every_kernel_compiles_and_spills_nothing(architecture: str) -> None:
    names = nested_cuda.kernels(architecture)
    compiled = nvrtc.compile_source(nested_cuda.sources(architecture), names, architecture)
    resources = {name: compiled.resources()[compiled.names[name]] for name in names}
    assert len(names) > (7 if architecture == "sm_90a" else 6)
    assert "serialized" not in compiled.log  # what ptxas says where wgmma waits for registers
    for name, (registers, spilled) in resources.items():
        assert spilled <= 12, name  # few_rows<1, 1, 1, ...>, for some NVRTCs, so that as many CTAs fit
        assert 32 < registers <= 255, name
    if architecture == "sm_90a":  # setmaxnreg shares out what a CTA was started with: of fewer it would wait for more
        for shape in itertools.chain.from_iterable(nested_cuda.MANY.values()):
            assert resources[shape.name][0] == 65536 // shape.beside // shape.launch(1, 16).threads // 8 * 8


@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize("architecture", ["sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a", "sm_121a"])
def test_what_lays_a_weight_out_compiles_and_spills_nothing(architecture: str) -> None:
    compiled = nvrtc.compile_source(nested_split.SOURCES, nested_split.KERNELS, architecture)
    for name in nested_split.KERNELS:
        registers, spilled = compiled.resources()[compiled.names[name]]
        assert spilled == 0
        assert 24 < registers <= 64  # so that 1,024 threads run on a multiprocessor at once, and hide the memory


def test_compiling_begins_once_on_a_thread() -> None:
    wanted = nested_split.SOURCES, nested_split.KERNELS, "sm_90a"
    nvrtc.begin.cache_clear()  # on a GPU other tests have compiled them
    begun = nvrtc.begin(*wanted)
    assert not begun.done()  # nobody has waited for it
    assert nvrtc.begin(*wanted) is begun
    assert begun.result().names.keys() == set(nested_split.KERNELS)


@pytest.mark.usefixtures("compiled_anew")
def test_control_too_many_threads_spill() -> None:
    compiled = nvrtc.compile_source(nested_cuda.sources("sm_89"), ["few_rows<8, 2, 1, 16>"], "sm_90a")
    assert max(spilled for _, spilled in compiled.resources().values()) > 0


def test_a_source_that_does_not_compile_says_why() -> None:
    with pytest.raises(InputError, match="does not compile for sm_90a"):
        nvrtc.compile_source(nested_cuda.sources("sm_89"), ["few_rows<1>"], "sm_90a")
