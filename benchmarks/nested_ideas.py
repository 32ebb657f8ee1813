"""What could make products with nested weights faster: edits of the kernels' source, against the kernels as they are.

    python benchmarks/nested_ideas.py             # one Hopper GPU, 8 cores: a minute
    python benchmarks/nested_ideas.py --check     # no GPU: do they compile, and do they spill

    early   A kernel starts while the one before it ends, asks for its first blocks of W, which nobody writes, and waits
            before it reads x (programmatic dependent launch). What it can hide: launches, and the first way to memory.
    last    CTAs that share columns leave their sums in global memory, and the last of them adds up (in the order of the
            columns, so that results stay the same): no clusters, so that all multiprocessors find work.
    both    both.

Weights of one shape follow each other in a CUDA graph, as in nested_linear.py; in an engine other kernels stand between
them, which `early` only meets at their ends. An idea that wins here goes into the kernels, and one that loses goes.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.nested_ablation import compile_edited
from benchmarks.nested_linear import COPIES, SHAPES, capture, distance, nest, random_weight, replay
from mixquant.kernels import nvrtc
from mixquant.kernels.nested_cuda import Launch, Many, NestedCUDA, plan

ROUNDS = 15
ROWS = (1, 8, 16, 32, 64, 128, 256)
SPLITS = {  # for `last`: rows -> shapes, of which the one with most CTAs that all run at once is taken
    32: [Many(32, 3, split, 1, 8) for split in (6, 5, 4, 3, 2, 1)],
    64: [Many(64, 3, split, 1, 7) for split in (6, 5, 4, 3, 2, 1)],
    128: [Many(128, 3, split, 1, 5) for split in (6, 5, 4, 3, 2, 1)],
    256: [Many(256, 2, split, 1, 4) for split in (4, 3, 2, 1)],
}

Edits = tuple[tuple[str, str], ...]

WAIT = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
OTHERS_MAY_START = 'asm volatile("griddepcontrol.launch_dependents;" ::: "memory");'
EARLY: Edits = (
    ("    look_ahead(warp % K);\n", f"    {OTHERS_MAY_START}\n    look_ahead(warp % K);\n    {WAIT}\n"),
    (
        "    if (threadIdx.x == GROUPS * 128) {  // who",
        f"    {OTHERS_MAY_START}\n    if (threadIdx.x == GROUPS * 128) {{  // who",
    ),
    (
        """    Turn<STAGES> turn;
#pragma unroll 1
    for (int i = 0; i < count; i++, turn.next()) {
        const int at = turn.place, column = (chunk + i) * COLUMNS;
        const u32 block = (u32)(chunk + i) * (w.n / ROWS) + tiles.first;
        u64* const full = &shared.full[at];
        wait(&shared.empty[at], turn.phase ^ 1);  // the first time around nobody has filled it
""",
        """    Turn<STAGES> turn;
    const auto bring_w = [&](int i, int at) {
        const int column = (chunk + i) * COLUMNS;
        const u32 block = (u32)(chunk + i) * (w.n / ROWS) + tiles.first;
        u64* const full = &shared.full[at];
""",
    ),
    (
        "        if constexpr (SHARE == 1) copy_box(shared.x[at], map",
        f"""    }};
#pragma unroll 1
    for (int i = 0; i < min(count, STAGES); i++) bring_w(i, i);
    {WAIT}
#pragma unroll 1
    for (int i = 0; i < count; i++, turn.next()) {{
        const int at = turn.place, column = (chunk + i) * COLUMNS;
        u64* const full = &shared.full[at];
        if (i >= STAGES) wait(&shared.empty[at], turn.phase ^ 1), bring_w(i, at);
        if constexpr (SHARE == 1) copy_box(shared.x[at], map""",
    ),
)
LAST: Edits = (
    ("__cluster_dims__(SHARE, 1, SPLIT)", "__cluster_dims__(1, 1, 1)"),
    ("cluster_address(shared.empty, blockIdx.z * SHARE + lane % SHARE)", "cluster_address(shared.empty, 0)"),
    ("const __grid_constant__ Map plane, u16* __restrict__ out, int m)",
     "const __grid_constant__ Map plane, u16* __restrict__ out, int m, float4* parts, u32* arrived)"),
    (
        "        else release_shared(), cluster_barrier();\n",
        """        else {
            const int tile = blockIdx.y * gridDim.x + blockIdx.x, size = X * TILE / 4;
            parts += (size_t)tile * SPLIT * size;
            asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * 128) : "memory");
            for (int e = threadIdx.x; e < size; e += GROUPS * 128)
                parts[rank * size + e] = *(const float4*)(sums + e / (TILE / 4) * PITCH + e % (TILE / 4) * 4);
            __threadfence();
            asm volatile("bar.sync 1, %0;" ::"n"(GROUPS * 128) : "memory");
            // The counter is back at zero behind the last.
            const int last = threadIdx.x == 0 && atomicInc(arrived + tile, SPLIT - 1) == SPLIT - 1;
            int mine;
            asm volatile("{\\n\\t.reg .pred before, after;\\n\\tsetp.ne.s32 before, %1, 0;\\n\\t"
                         "barrier.cta.red.or.pred after, 1, %2, before;\\n\\tselp.s32 %0, 1, 0, after;\\n\\t}"
                         : "=r"(mine) : "r"(last), "n"(GROUPS * 128) : "memory");
            if (!mine) return;
            __threadfence();
        }
""",
    ),
    ("for (int e = rank * GROUPS * 128 + threadIdx.x; e < rows * (TILE / 4); e += SPLIT * GROUPS * 128) {",
     "for (int e = threadIdx.x; e < rows * (TILE / 4); e += GROUPS * 128) {"),
    (
        """                const u32 theirs = cluster_address(sums + i * PITCH + n, k * SHARE + blockIdx.x % SHARE);
                float4 v;
                asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                             : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(theirs) : "memory");
""",
        """                const float4 v = SPLIT == 1 ? *(const float4*)(sums + i * PITCH + n)
                                            : __ldcg(parts + k * (X * TILE / 4) + e);
""",
    ),
    ("        if constexpr (SPLIT > 1) cluster_barrier();\n", ""),
    ("    if constexpr (SPLIT * SHARE > 1) cluster_barrier();", "    //"),
)  # fmt: skip
IDEAS: dict[str, Edits] = {"as it is": (), "early": EARLY, "last": LAST, "both": (*EARLY, *LAST)}


class Idea(nvrtc.Module):
    """Kernels with two more arguments: room for the sums of CTAs, and how many have left theirs. early: they may start
    before the one before them has ended."""

    def __init__(self, compiled: nvrtc.Compiled, device: torch.device, early: bool, shared: Sequence[Tensor]) -> None:
        super().__init__(compiled, device)
        self.early = early
        self.more = [ctypes.c_void_p(tensor.data_ptr()) for tensor in shared]

    def launch(self, kernel: str, grid: nvrtc.Dim3, threads: int, shared_bytes: int, *arguments: Any) -> None:
        arguments = (*arguments, *self.more)  # a kernel without them does not look
        if not self.early:
            return super().launch(kernel, grid, threads, shared_bytes, *arguments)
        driver = self._driver
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        attribute, value, config = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue(), driver.CUlaunchConfig()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = shared_bytes, torch.cuda.current_stream().cuda_stream
        config.attrs, config.numAttrs = [attribute], 1
        (status,) = driver.cuLaunchKernelEx(config, self.function(kernel, shared_bytes), ctypes.addressof(pointers), 0)
        if int(status):
            raise RuntimeError(status.name)


def shape_of(idea: str, rows: int, n: int, multiprocessors: int) -> Launch:
    """What the tables say, or for `last` the shape with most CTAs."""
    most = next((most for most in SPLITS if rows <= most), 0)
    if idea in ("last", "both") and rows > 16:
        fitting = (shape.launch(rows, n) for shape in SPLITS[most])
        return next(launch for launch in fitting if math.prod(launch.grid) <= multiprocessors or launch.grid[2] == 1)
    found = plan(rows, n, "sm_90a", multiprocessors)
    assert found is not None
    return found


def names() -> list[str]:
    launches = [shape_of(idea, rows, n, 132) for idea in ("early", "last") for rows in ROWS for n, _ in SHAPES.values()]
    return sorted({launch.kernel for launch in launches})


def compile_ideas() -> dict[tuple[str, str], nvrtc.Compiled]:
    jobs = [(idea, name) for idea in IDEAS for name in names()]
    with ProcessPoolExecutor() as pool:
        found = pool.map(compile_edited, [IDEAS[idea] for idea, _ in jobs], [name for _, name in jobs])
        return dict(zip(jobs, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    compiled = compile_ideas()
    for (idea, name), binary in compiled.items():
        if any(spilled for _, spilled in binary.resources().values()):
            print(f"{idea}: {name} spills")
    if args.check:
        print(f"{len(compiled)} kernels compiled")
    else:
        measure(compiled)


def measure(compiled: dict[tuple[str, str], nvrtc.Compiled]) -> None:
    device = torch.device("cuda", 0)
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    shared = [torch.empty(1 << 26, device=device), torch.zeros(4096, dtype=torch.int32, device=device)]
    modules = {
        (idea, name): Idea(binary, device, idea in ("early", "both"), shared)
        for (idea, name), binary in compiled.items()
    }
    dense = {layer: [random_weight(*shape) for _ in range(COPIES)] for layer, shape in SHAPES.items()}
    nested = {layer: [nest(weight) for weight in weights] for layer, weights in dense.items()}
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; us, and the error over cuBLAS's")
    for rows in ROWS:
        totals: Counter[str] = Counter()
        for layer, (n, k) in SHAPES.items():
            x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
            outs = {idea: x.new_full((rows, n), torch.nan) for idea in IDEAS}
            arms: dict[str, Callable[[], object]] = {
                idea: partial(
                    products,
                    launch := shape_of(idea, rows, n, multiprocessors),
                    modules[idea, launch.kernel],
                    nested[layer],
                    x,
                    outs[idea],
                )
                for idea in IDEAS
            }
            stock = partial(stock_products, x, dense[layer])
            times = take_turns({"cuBLAS": stock, **arms})
            truth = x.double() @ dense[layer][-1].double().T  # of the weight whose product is written last
            error = {idea: distance(out, truth) / distance(stock()[-1], truth) for idea, out in outs.items()}
            totals.update(times)
            said = (
                f"{name} {time:.1f}" + (f" ({error[name]:.2f})" if name in error else "")
                for name, time in times.items()
            )
            print(f"{rows:4} {layer:8}", ", ".join(said), flush=True)
        print(
            f"{rows:4} all     ",
            ", ".join(f"{name} {t:.1f} ({t / totals['cuBLAS']:.2f})" for name, t in totals.items()),
        )


def take_turns(arms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds for one of an arm's products: medians."""
    graphs = {name: capture(arm) for name, arm in arms.items()}
    turns = [{name: replay(graph) / COPIES for name, graph in graphs.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(turn[name] for turn in turns) for name in graphs}


def stock_products(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [torch.nn.functional.linear(x, weight) for weight in weights]


def products(launch: Launch, module: nvrtc.Module, kernels: Sequence[NestedCUDA], x: Tensor, out: Tensor) -> None:
    for kernel in kernels:
        kernel.start(launch, module, x, out, None)


if __name__ == "__main__":
    main()
