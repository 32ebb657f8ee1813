"""The product with a nested weight on NVIDIA GPUs: `nested_linear.cu`, its memory, and which kernel takes how many rows."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mixquant.formats import nested
from mixquant.formats.nested import NestedTensor
from mixquant.kernels import nvrtc

SOURCE = "nested_linear.cu"
BLOCK = 64
"""Columns that a warp rebuilds at once."""

LIFT = 2.0**7
"""What kernels lift rebuilt weights by, beyond the plane's own scale (`rebuild` in the source)."""

SHAPES = (
    [(1, w, n, k) for w, n, k in ((1, 1, 8), (1, 1, 16), (1, 1, 12), (2, 1, 16))]
    + [(2, w, n, k) for w, n, k in ((2, 1, 8), (1, 2, 8), (2, 1, 16), (2, 1, 12), (1, 1, 8), (1, 1, 16), (1, 1, 12))]
    + [(4, w, n, k) for w, n, k in ((2, 1, 12), (2, 2, 2), (2, 1, 8), (1, 1, 8), (1, 1, 12), (1, 2, 4))]
)
MANY = [(x, s) for x in (16, 32, 64, 128) for s in (1, 2, 4, 8)]


class Launch(NamedTuple):
    kernel: str
    grid: nvrtc.Dim3
    threads: int
    shared_bytes: int


class _Weight(ctypes.Structure):
    """`struct Weight` of the source."""

    _fields_ = (
        ("plane", ctypes.c_void_p),
        ("nibbles", ctypes.c_void_p),
        ("escapes", ctypes.c_void_p),
        ("more", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int),
        ("k", ctypes.c_int),
    )


def architecture(device: torch.device) -> str:
    """What to compile for: `a` opens wgmma on Hopper, and FP4 on Blackwell."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def kernels(architecture: str) -> tuple[str, ...]:
    """The kernels that an architecture has."""
    few = tuple(f"few_rows<{x}, {w}, {n}, {k}>" for x, w, n, k in SHAPES)
    return few + (() if architecture == "sm_89" else tuple(f"many_rows<{x}, {s}>" for x, s in MANY))


def launch(m: int, rows: int, x: int, w: int, n: int, k: int) -> Launch:
    return Launch(f"few_rows<{x}, {w}, {n}, {k}>", (-(-rows // (n * w * 16)), -(-m // (x * 8)), 1), n * k * 32, n * k * w * x * 512)


def many(m: int, n: int, x: int, split: int) -> Launch:
    shared = max(4 * (8 * (32 * 48 + 16) + x * 128), x * 132 * 4)
    return Launch(f"many_rows<{x}, {split}>", (-(-n // 128), -(-m // x), split), 256, shared)


class NestedWeight:
    """The tensors of a nested weight in the order in which the kernels read them."""

    def __init__(self, weight: NestedTensor) -> None:
        n, k = weight.shape
        self.plane = weight.plane
        self.nibbles = interleave(weight.nibbles)
        self.escapes, self.more = blocks_of_escapes(weight)
        self.scales = (weight.scales * LIFT).squeeze(-1)
        self.n, self.k = n, k
        arch = architecture(weight.plane.device)
        self.module = nvrtc.load(SOURCE, kernels(arch), arch, weight.plane.device)

    def launch(self, launch: Launch, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """x: bfloat16 [rows, K], out: bfloat16 [rows, N], both contiguous."""
        weight = _Weight(
            self.plane.data_ptr(), self.nibbles.data_ptr(), self.escapes.data_ptr(), self.more.data_ptr(),
            self.scales.data_ptr(), 0 if bias is None else bias.data_ptr(), self.n, self.k,
        )  # fmt: skip
        pointers = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr())
        self.module.launch(*launch, weight, *pointers, ctypes.c_int(x.shape[0]))


def interleave(nibbles: Tensor) -> Tensor:
    """Nibbles [N, K/2] by rows, in the order of the kernels' threads: uint8 [N/16, K/64, 32, 16]."""
    n, k = nibbles.shape[0], nibbles.shape[1] * 2
    single = torch.stack([nibbles & 15, nibbles >> 4], -1)
    tile = single.view(n // 16, 2, 8, k // BLOCK, 4, 2, 2, 4)  # tile, half of its rows, g, block, t, word, half, byte
    one, two = tile.permute(0, 3, 2, 4, 1, 5, 6, 7).unbind(-2)
    return (one | two << 4).reshape(n // 16, k // BLOCK, 32, 16)


def deinterleave(nibbles: Tensor) -> Tensor:
    """The inverse of `interleave`."""
    tiles, blocks = nibbles.shape[:2]
    packed = nibbles.view(tiles, blocks, 8, 4, 2, 2, 4)
    single = torch.stack([packed & 15, packed >> 4], -2).permute(0, 4, 2, 1, 3, 5, 6, 7).reshape(tiles * 16, -1, 2)
    return single[..., 0] | single[..., 1] << 4


def blocks_of_escapes(weight: NestedTensor) -> tuple[Tensor, Tensor]:
    """Escapes by block of 16 x 64 weights: int32 [blocks, 4], how many and the first three; and the others, int32 [more].

    An escape is its column in the block << 20 | its row << 16 | its weight's BF16 bits, lifted as the kernels' are. (One
    2^133 times smaller than its row's largest becomes zero.) A count's upper bits say where a block's others begin.
    """
    n, k = weight.shape
    rows, columns = weight.escapes.rows(), weight.escapes.columns.to(torch.int64)
    block, order = (rows // nested.TILE * (k // BLOCK) + columns // BLOCK).sort(stable=True)
    rows, columns = rows[order], columns[order]
    values = weight.join()[rows, columns].double() / (weight.scales[rows, 0].double() * LIFT)
    bits = values.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    escapes = (columns % BLOCK << 20 | rows % nested.TILE << 16).to(torch.int32) | bits
    counts = torch.bincount(block, minlength=n // nested.TILE * (k // BLOCK))
    place = torch.arange(len(block), device=block.device) - (counts.cumsum(0) - counts)[block]
    others = (counts - 3).clamp(min=0)
    table = torch.zeros(len(counts), 4, dtype=torch.int32, device=block.device)
    table[:, 0] = (counts | others.cumsum(0) - others << 11).to(torch.int32)
    first = place < 3
    table[block[first], place[first] + 1] = escapes[first]
    return table, escapes[~first]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
