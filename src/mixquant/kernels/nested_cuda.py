"""The product with a nested weight on NVIDIA GPUs: its kernels, and which takes how many rows.

    few_rows    up to 32 rows, on Hopper up to 16: waits for memory, and reads a quarter less of it than BF16 does
    many_rows   up to 512 rows, Hopper only: tensor cores by wgmma
    join        more rows: the BF16 weight, for as long as one product by cuBLAS takes

Which one depends on the device and the number of rows, and all of them multiply by the same weights, which
`nested_split` has laid out: results differ by the order of their sums, as cuBLAS's own do.
Measured by `benchmarks/nested_linear.py`.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mixquant.formats import nested
from mixquant.kernels import nested_split, nvrtc
from mixquant.kernels.base import Accepted, Rejected, Verdict
from mixquant.kernels.cuda import reject_unless_bf16_cuda, reject_unless_fp8
from mixquant.kernels.nested import BLOCK, NestedKernel
from mixquant.kernels.nested_split import ROOM, Blocks
from mixquant.packages import installed

LIFT = 2.0**7
"""By how much more kernels lift rebuilt weights than the plane's scale takes back (`rebuild` in nested_block.cu)."""

MANY_ROWS = 512
"""Beyond so many rows a product is bound by arithmetic, and cuBLAS's is faster even with the weight joined before."""


class Launch(NamedTuple):
    """How to start a kernel. boxes: rows of x and of W that the copy engine brings at once, where it is asked to."""

    kernel: str
    grid: nvrtc.Dim3
    threads: int
    shared_bytes: int
    boxes: tuple[int, int] | None = None


class Few(NamedTuple):
    """Arguments of `few_rows`, in its order: tiles of 8 rows of x and of 16 rows of W for a warp, warps side by side,
    and warps that share the columns."""

    x: int
    w: int
    n: int
    k: int

    @property
    def name(self) -> str:
        return f"few_rows<{self.x}, {self.w}, {self.n}, {self.k}>"

    def launch(self, rows: int, n: int) -> Launch:
        ctas, warps = -(-n // (self.n * self.w * nested.TILE)), self.n * self.k
        return Launch(self.name, (ctas, -(-rows // (self.x * 8)), 1), warps * 32, warps * self.w * self.x * 512)


class Many(NamedTuple):
    """Arguments of `many_rows`, in its order: rows of x for a CTA, groups of four warps that multiply, CTAs that share
    the columns, and blocks of columns in shared memory at once."""

    x: int
    groups: int
    split: int
    stages: int

    @property
    def name(self) -> str:
        return f"many_rows<{', '.join(map(str, self))}>"

    @property
    def beside(self) -> int:
        """CTAs of a multiprocessor, as its kernel has it."""
        return 2 if self.groups == 2 and self.x <= 32 else 1

    @property
    def shared_bytes(self) -> int:
        """Of stages and barriers, or in the end of sums."""
        block = self.groups * 4 * (1024 + 512 + 16)  # plane, nibbles and escapes of 16 rows for each warp
        stages = self.stages * (self.x * BLOCK * 2 + block + 16)
        return max(stages, self.x * (self.groups * 64 + 4) * 4)

    def launch(self, rows: int, n: int) -> Launch:
        tile = self.groups * 64
        grid = (-(-n // tile), -(-rows // self.x), self.split)
        return Launch(self.name, grid, (self.groups + 1) * 128, self.shared_bytes, (self.x, tile))

    def fits(self, rows: int, n: int, multiprocessors: int) -> bool:
        """Whether all CTAs run at once."""
        room = multiprocessors * self.beside
        if self.split > 2:
            room = int(ROOM_FOR_CLUSTERS * room)
        return math.prod(self.launch(rows, n).grid) <= room


FEW = {
    8: (2, Few(1, 1, 1, 16), Few(1, 1, 1, 8)),
    16: (2, Few(2, 1, 1, 12), Few(2, 1, 1, 8)),
    32: (3, Few(4, 2, 1, 12), Few(4, 2, 2, 2)),
}
"""Rows of x -> tiles of W for a multiprocessor, up to how many the first shape is faster, and the second beyond."""

MANY = {
    16: (Many(16, 3, 1, 9),),
    32: (Many(32, 3, 5, 8), Many(32, 2, 4, 6), Many(32, 3, 3, 8), Many(32, 3, 1, 8)),
    64: (Many(64, 3, 5, 7), Many(64, 3, 3, 7), Many(64, 3, 1, 7)),
    128: (Many(128, 3, 5, 5), Many(128, 3, 3, 5), Many(128, 3, 1, 5)),
    256: (Many(256, 2, 3, 5), Many(256, 2, 2, 5)),
    512: (Many(256, 2, 2, 5), Many(256, 2, 1, 5)),
}
"""Rows of x -> shapes of `many_rows`, most CTAs first: the first whose CTAs run at once is taken, or the last. Up to 16
rows, where few_rows waits for nothing but memory, only weights so wide that each multiprocessor has a CTA."""

ROOM_FOR_CLUSTERS = 0.85
"""Share of the multiprocessors that clusters of more than two CTAs can fill: each has to find all of them within one
part of the GPU. On an H200 22 clusters of 5 run at once, 32 of 4 or 22 of 6 do not; with two CTAs a multiprocessor 48
clusters of 4 were seen, and more are not known."""


def sources(architecture: str) -> tuple[str, ...]:
    """The files to compile for an architecture."""
    return ("nested_block.cu", "nested_few_rows.cu", *(["nested_many_rows.cu"] if architecture == "sm_90a" else []))


def kernels(architecture: str) -> tuple[str, ...]:
    """The kernels that an architecture has."""
    few = tuple(shape.name for _, *shapes in FEW.values() for shape in shapes)
    many = tuple(shape.name for shapes in MANY.values() for shape in shapes)
    return (*few, *(many if architecture == "sm_90a" else ()), "join")


@functools.cache
def _wanted(architecture: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    return sources(architecture), kernels(architecture), architecture


def plan(rows: int, n: int, architecture: str, multiprocessors: int) -> Launch | None:
    """The launch that multiplies so many rows of x by a weight of n rows; None: by its join."""
    if architecture == "sm_90a" and 8 < rows <= MANY_ROWS:
        shapes = next(shapes for most, shapes in MANY.items() if rows <= most)
        many = next((shape for shape in shapes if shape.fits(rows, n, multiprocessors)), shapes[-1])
        launch = many.launch(rows, n)
        if rows > 16 or math.prod(launch.grid) > ROOM_FOR_CLUSTERS * multiprocessors:
            return launch
    for most, (per_multiprocessor, small, large) in FEW.items():
        if rows <= most:
            shape = small if n <= per_multiprocessor * multiprocessors * nested.TILE else large
            return shape.launch(rows, n)
    return None


class NestedCUDA(NestedKernel):
    """BF16 products with 12 bits a weight."""

    name = "mixquant.nested"

    @classmethod
    def check(cls, device: torch.device, dtype: torch.dtype) -> Verdict:
        if rejected := reject_unless_bf16_cuda(device, dtype) or reject_unless_fp8(device):
            return rejected
        if not installed("cuda.bindings.nvrtc", "cuda.bindings.driver"):
            return Rejected("compiles its kernels with cuda-bindings: pip install cuda-bindings nvidia-cuda-nvrtc")
        return Accepted()

    @classmethod
    def default_on(cls, device: torch.device) -> bool:
        """On Hopper alone: elsewhere more than 32 rows, and so the answers of a busy server, take the join."""
        return nvrtc.architecture(device) == "sm_90a"

    @classmethod
    def nbytes(cls, n: int, k: int, dtype: torch.dtype) -> int:
        """Plane, nibbles, 16 bytes of escapes a block and room for more, and two scales a row."""
        return n * k * 3 // 2 + n // nested.TILE * (k // BLOCK) * 16 + n * k // ROOM * 4 + n * 8

    @classmethod
    def prepare(cls, device: torch.device) -> None:
        nvrtc.begin(*_wanted(nvrtc.architecture(device)))
        nested_split.prepare(device)

    @classmethod
    def nest(cls, weight: Tensor) -> Blocks | str:
        return nested_split.split(weight)

    def __init__(self, weight: Blocks) -> None:
        self.plane = weight.plane
        self.plane_scales = weight.scales
        self.nibbles = weight.nibbles
        self.escapes = weight.escapes
        self.more = weight.more
        self.scales = (weight.scales * LIFT).squeeze(-1)
        self.prepare(weight.plane.device)
        self._find_device(weight.plane.device)

    def _find_device(self, device: torch.device) -> None:
        self.architecture = nvrtc.architecture(device)
        self.multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count

    @functools.cached_property
    def module(self) -> nvrtc.Module:
        """At the first product: until then it may compile."""
        return nvrtc.load(*_wanted(self.architecture), self.plane.device)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():
            weight = self.plane, self.nibbles, self.escapes, self.more, self.scales
            return cast(Tensor, _opaque_linear(x, bias, *weight))
        launch = plan(x.shape[0], self.plane.shape[0], self.architecture, self.multiprocessors)
        if launch is None:
            return nn.functional.linear(x, self.dense(), bias)
        out = x.new_empty(x.shape[0], self.plane.shape[0])
        if len(x):
            self.start(launch, self.module, x.contiguous(), out, bias)
        return out

    def start(self, launch: Launch, module: nvrtc.Module, x: Tensor, out: Tensor, bias: Tensor | None) -> None:
        """Let a kernel of `module` write the product to `out` [rows, N]; x [rows, K] is contiguous."""
        sources: list[Any] = [_pointer(x)]
        if launch.boxes is not None:
            plane = nvrtc.tensor_map(self.plane.data_ptr(), *self.plane.shape, 1, launch.boxes[1], BLOCK)
            sources = [nvrtc.tensor_map(x.data_ptr(), *x.shape, 2, launch.boxes[0], BLOCK), plane]
        rows = ctypes.c_int(x.shape[0])
        module.launch(*launch[:4], self._weight(bias), *sources, _pointer(out), rows, early=True)

    def dense(self) -> Tensor:
        n, k = self.plane.shape
        out = torch.empty(n, k, dtype=torch.bfloat16, device=self.plane.device)
        grid = (n // nested.TILE, -(-k // (BLOCK * 32)), 1)  # four blocks for each of eight warps
        self.module.launch("join", grid, 256, 0, self._weight(None), _pointer(out))
        return out

    def _weight(self, bias: Tensor | None) -> _Weight:
        tensors = (self.plane, self.nibbles, self.escapes, self.more, self.scales, bias)
        return _Weight(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors), *self.plane.shape)


@torch.library.custom_op("mixquant::nested_linear", mutates_args=())
def _opaque_linear(
    x: Tensor, bias: Tensor | None, plane: Tensor, nibbles: Tensor, escapes: Tensor, more: Tensor, scales: Tensor
) -> Tensor:
    """The same for torch.compile, which cannot look inside; outside of it, a call of an op costs more than it."""
    kernel = object.__new__(NestedCUDA)
    kernel.plane, kernel.nibbles, kernel.escapes, kernel.more, kernel.scales = plane, nibbles, escapes, more, scales
    kernel._find_device(plane.device)
    return kernel(x, bias)


@_opaque_linear.register_fake
def _(x: Tensor, bias: Tensor | None, plane: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], plane.shape[0])


class _Weight(ctypes.Structure):
    """`struct Weight` of nested_block.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("plane", "nibbles", "escapes", "more", "scales", "bias")),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
    )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
