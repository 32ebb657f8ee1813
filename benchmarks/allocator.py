"""How much of a GPU torch's cache takes while an 8B model's linear layers are nested, by the allocator's own rules.

    python benchmarks/allocator.py        # any machine: ten seconds

Every allocation is noted that laying out a weight of each shape takes. They are then replayed, layer by layer behind
the BF16 weights of the whole model, through the rules of torch's caching allocator (c10/cuda/CUDACachingAllocator.cpp):
the best fitting free block; segments of 2 MiB for up to 1 MiB, of 20 MiB for less than 10 MiB, else of their own size;
what is over is cut off, and joined again. `max_split_size_mb` forbids to cut for what is as large, to serve what is
smaller from a block as large, and to take one that is 20 MiB too large.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.nested_linear import SHAPES, nest
from mixquant.kernels import nvrtc

MIB, LAYERS = 1 << 20, 36
Event = tuple[int, int]
"""The address of an allocation and its bytes, or those that are freed, less than 0."""


@dataclass(eq=False)
class Block:
    size: int
    small: bool
    before: Block | None = None
    behind: Block | None = None
    free: bool = False


class Cache:
    """The allocator: bytes in segments, now and at most."""

    def __init__(self, max_split: int) -> None:
        self.max_split, self.reserved, self.peak = max_split, 0, 0
        self.blocks: dict[bool, list[Block]] = {True: [], False: []}

    def take(self, size: int) -> Block:
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        free = self.blocks[small]
        at = bisect.bisect_left(free, size, key=lambda block: block.size)
        if at < len(free) and self._serves(free[at], size):
            block = free.pop(at)
        else:
            block = Block(2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB, small)
            self.reserved += block.size
            self.peak = max(self.peak, self.reserved)
        block.free = False
        over = block.size - size
        if over >= 512 if small else over > MIB and size < self.max_split:
            rest = Block(over, small, block, block.behind)
            if block.behind:
                block.behind.before = rest
            block.behind, block.size = rest, size
            self._put(rest)
        return block

    def _serves(self, block: Block, size: int) -> bool:
        if size < self.max_split:
            return block.size < self.max_split
        return block.size < size + 20 * MIB

    def give(self, block: Block) -> None:
        for left, right in ((block, block.behind), (block.before, block)):
            other = right if left is block else left
            if left and right and other and other.free:
                self.blocks[other.small].remove(other)
                left.size, left.behind = left.size + right.size, right.behind
                if right.behind:
                    right.behind.before = left
                block = left
        self._put(block)

    def _put(self, block: Block) -> None:
        block.free = True
        bisect.insort(self.blocks[block.small], block, key=lambda other: other.size)

    def empty(self) -> None:
        """torch.cuda.empty_cache: whole segments go."""
        for free in self.blocks.values():
            whole = [block for block in free if not (block.before or block.behind)]
            self.reserved -= sum(block.size for block in whole)
            free[:] = [block for block in free if block.before or block.behind]


def main() -> None:
    print("| max_split_size_mb | cache | GiB at most | GiB in the end |\n|---|---|---|---|")
    events = [allocations(torch.empty(*shape).uniform_(-1e-3, 1e-3).bfloat16()) for shape in SHAPES.values()]
    for max_split, emptied in itertools.product((1 << 60, 20 * MIB), (False, True)):
        cache = load(events, max_split, emptied)
        limit, kept = "–" if max_split > 1 << 40 else 20, "given back" if emptied else "kept"
        print(f"| {limit} | {kept} | {cache.peak / 2**30:.1f} | {cache.reserved / 2**30:.1f} |", flush=True)


def load(events: list[list[Event]], max_split: int, emptied: bool) -> Cache:
    cache = Cache(max_split)
    weights = [[cache.take(n * k * 2) for n, k in SHAPES.values()] for _ in range(LAYERS)]
    for layer in weights:
        for weight, happened in zip(layer, events, strict=True):
            live: dict[int, Block] = {}
            for address, size in happened:
                if size > 0:
                    live[address] = cache.take(size)
                elif address in live:
                    cache.give(live.pop(address))
            cache.give(weight)
            if emptied:
                cache.empty()
    return cache


def allocations(weight: torch.Tensor) -> list[Event]:
    """What laying a weight out allocates and frees, in order: kernels do neither, and are left out."""
    module, gpu = SimpleNamespace(launch=lambda *arguments: None), SimpleNamespace(multi_processor_count=132)
    with (
        mock.patch.object(nvrtc, "load", return_value=module),
        mock.patch.object(nvrtc, "architecture", return_value="sm_90a"),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=gpu),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled,
    ):
        kept = nest(weight)
    found: list[tuple[int, int, int]] = []
    walk(profiled.profiler.kineto_results.experimental_event_tree(), found.append)  # type: ignore[union-attr]
    del kept
    return [(address, size) for _, address, size in sorted(found)]


def walk(nodes: list[object], found: Callable[[tuple[int, int, int]], None]) -> None:
    for node in nodes:
        if node.name == "[memory]":  # type: ignore[attr-defined]
            fields = node.extra_fields  # type: ignore[attr-defined]
            found((node.start_time_ns, fields.ptr, fields.alloc_size))  # type: ignore[attr-defined]
        walk(node.children, found)  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
