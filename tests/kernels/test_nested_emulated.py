"""The kernels of nested weights without a GPU: their own source, run thread by thread on a CPU (emulator/).

`test_cuda` runs the same kernels on a GPU; `test_nested_split` is about those that lay a weight out. Here it is seen
that each thread finds its weights, escapes and rows of x and touches nothing else, that nobody reads what is not there
yet or overwrites what is still read, and that every wait ends.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mixquant.formats import nested
from mixquant.kernels import nested_cuda, nvrtc
from mixquant.kernels.nested_cuda import Few, Many, NestedCUDA
from tests.kernels import emulator, nested_layout
from tests.kernels.emulator import EmulationError, Module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"),
]

FEW = [shape for _, *shapes in nested_cuda.FEW.values() for shape in shapes]
SHAPES = [*FEW, *(shape for shapes in nested_cuda.MANY.values() for shape in shapes)]
FEW_STAGES = Many(64, 2, 2, 3)
OTHERS = [FEW_STAGES, Many(16, 3, 2, 9), Many(32, 2, 1, 12)]
"""No entry of the table has so few stages, or so many CTAs of so few rows, but the kernel can."""

ROUNDED = 1.01
"""An error beside that of rounding the float64 product to BF16 once: sums in FP32 add next to nothing."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = (*nested_cuda.kernels("sm_90a"), *(shape.name for shape in OTHERS))
    return emulator.build(tmp_path_factory.mktemp("nested"), nested_cuda.sources("sm_90a"), names)


@pytest.fixture
def module(library: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """`NestedCUDA` finds an H200 that is this CPU."""
    loaded = Module(library)
    monkeypatch.setattr(nvrtc, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(nvrtc, "load", lambda *arguments: loaded)
    monkeypatch.setattr(nvrtc, "tensor_map", emulator.tensor_map)
    return loaded


def awkward(n: int, k: int) -> Tensor:
    """A weight [n, k] of all that a nested one has to hold: a dozen escapes in a block, zeros, rows of nothing."""
    weight = torch.randn(n, k) * 0.02
    weight[:, ::64] *= 30
    weight[::3, 5:40:2] *= 1e-6
    weight[:, 7], weight[1], weight[2] = 0.0, 0.0, -0.0
    return weight.bfloat16()


def laid_out(weight: nested.NestedTensor, module: Module) -> NestedCUDA:
    """A kernel whose tensors stand between pages that nobody may touch."""
    kernel = NestedCUDA(nested_layout.lay_out(weight))
    for name, value in list(vars(kernel).items()):
        if isinstance(value, Tensor):
            setattr(kernel, name, module.guarded(value))
    return kernel


def error(shape: Few | Many, module: Module, weight: Tensor, rows: int, biased: bool = False) -> float:
    """Of the product by one kernel, in units of what rounding the truth once costs."""
    n, k = weight.shape
    kernel = laid_out(nested.split(weight), module)
    x, bias = module.guarded(torch.randn(rows, k).bfloat16()), module.guarded(torch.randn(n).bfloat16())
    out = module.guarded(torch.full((rows, n), torch.nan, dtype=torch.bfloat16))
    kernel.start(shape.launch(rows, n), module, x, out, bias if biased else None)
    return beside_rounding(out, x.double() @ weight.double().T + (bias.double() if biased else 0))


def beside_rounding(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / (truth.bfloat16().double() - truth).norm())


def rows_of(shape: Few | Many) -> int:
    return shape.x * (8 if isinstance(shape, Few) else 1)


@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS], ids=lambda shape: shape.name)
def test_every_kernel_takes_every_weight(shape: Few | Many, module: Module) -> None:
    """Fewer columns than CTAs that share them, or all stages in use and in use again; rows that nothing divides."""
    torch.manual_seed(0)
    most = rows_of(shape)
    cases = [(16, 64, 1), (272, 320, most - 3), (48, 1088, most), (208, 2624, most // 2), (400, 576, most + 5)]
    for module.seed, (n, k, rows) in enumerate(cases):
        weight = awkward(n, k)
        assert error(shape, module, weight, rows, biased=n % 32 == 16) < ROUNDED, (n, k, rows)
    plane = nested.split(weight).fp8.dequantize()
    x = torch.randn(rows, k).double()
    assert beside_rounding(x @ plane.double().T, x @ weight.double().T) > 3


@pytest.mark.parametrize("escapes", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("shape", [FEW[0], FEW[-1], FEW_STAGES], ids=lambda shape: shape.name)
def test_any_number_of_escapes_in_any_block(shape: Few | Many, escapes: int, module: Module) -> None:
    torch.manual_seed(escapes)
    weight = torch.randn(64, 256).clamp(min=0.01).bfloat16()
    blocks = weight.view(4, 16, 4, 64)
    for tile, chunk in [(0, 0), (1, 2), (1, 3), (3, 3)]:
        places = torch.randperm(1024)[:escapes]
        blocks[tile, places // 64, chunk, places % 64] = 1.0078125 * 2.0**-24
    kernel = laid_out(nested.split(weight), module)
    assert int(nested.split(weight).escapes.starts[-1]) == escapes * 4
    assert torch.equal(kernel.dense().view(torch.int16), weight.view(torch.int16))
    # Only rows of x that show them: what is not an escape meets a zero.
    x = torch.zeros(8, 256)
    column = int((weight.float() < 0.001).sum(0).argmax())
    x[:, column] = torch.randn(8)
    x, out = module.guarded(x.bfloat16()), module.guarded(torch.empty(8, 64, dtype=torch.bfloat16))
    kernel.start(shape.launch(8, 64), module, x, out, None)
    assert torch.equal(out, (x.double() @ weight.double().T).bfloat16())


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 192), (272, 1088), (32, 4096)])
def test_a_nested_weight_comes_back_bit_for_bit(n: int, k: int, module: Module) -> None:
    torch.manual_seed(n)
    weight = awkward(n, k)
    split = nested.split(weight)
    assert torch.equal(laid_out(split, module).dense().view(torch.int16), weight.view(torch.int16))
    bare = replace(split, escapes=nested.split(torch.zeros_like(weight)).escapes)
    assert not torch.equal(laid_out(bare, module).dense().view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90a"])
def test_a_layer_is_multiplied_by_whatever_takes_so_many_rows(
    architecture: str, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvrtc, "architecture", lambda device: architecture)
    torch.manual_seed(0)
    weight, bias = awkward(272, 384), torch.randn(272).bfloat16()
    kernel = laid_out(nested.split(weight), module)
    for module.seed, rows in enumerate((1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 256, 300)):
        x = torch.randn(rows, 384).bfloat16()
        assert beside_rounding(kernel(x, bias), x.double() @ weight.double().T + bias.double()) < ROUNDED, rows


FAULTS = {
    "an escape lands in the other half of its register": [("% 2 ? 0x5410 : 0x3254", "% 2 ? 0x3254 : 0x5410")],
    "units stand in another order": [("return 4 * g + (t ^ g / 2);", "return 4 * g + (t ^ g % 4);")],
    "nobody waits": [
        ("    __syncthreads();\n    for (int e", "    for (int e"),
        ("wait(&shared.full[at], fetched.phase);", ""),
    ],
    "x is read while it may still be written": [
        ("    look_ahead(warp % K);\n    wait_for_before();", "    look_ahead(warp % K);"),
        ("    if (brings_x) wait_for_before();", ""),
    ],
    "a stage is given back while it is read": [
        ("if (i && lane == 0) arrive(&shared.empty[before])", "if (lane == 0) arrive(&shared.empty[made.place])")
    ],
    "a block is rebuilt where another is multiplied": [("wait_group.sync.aligned 1;", "wait_group.sync.aligned 2;")],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_control_a_fault_is_found(fault: str, module: Module, tmp_path: Path) -> None:
    """By some seeds, if it is one of order."""
    shapes: list[Few | Many] = [FEW_STAGES]
    if "stage" not in fault and "rebuilt" not in fault:
        shapes.append(Few(1, 1, 1, 8))
    files = nested_cuda.sources("sm_90a")
    faulty = Module(emulator.build(tmp_path, files, [shape.name for shape in shapes], FAULTS[fault]))
    torch.manual_seed(0)
    for shape in shapes:
        assert any(found(shape, faulty, seed) for seed in range(8)), shape.name


def found(shape: Few | Many, module: Module, seed: int) -> bool:
    module.seed = seed
    try:
        return not error(shape, module, awkward(144, 1088), rows_of(shape)) < ROUNDED
    except EmulationError:
        return True


def test_an_instruction_that_the_emulator_does_not_know_does_not_compile(tmp_path: Path) -> None:
    edit = ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.unheard_of;")
    with pytest.raises(EmulationError, match="wgmma_fence_sync_unheard_of"):
        emulator.build(tmp_path, nested_cuda.sources("sm_90a"), [FEW_STAGES.name], [edit])
