"""`many_rows` without a GPU: its own source, compiled by g++ with Hopper's instructions replaced (cuda_on_cpu.h).

`test_cuda` runs the same kernels on a GPU; here it is seen that each thread finds its weights, escapes and rows of x,
and that barriers and clusters end.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixquant.formats import nested
from mixquant.kernels import nested_cuda
from mixquant.kernels.nested_cuda import Many

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

SHAPES = (Many(64, 3, 1, 1, 7), Many(64, 2, 2, 2, 3), Many(128, 3, 3, 1, 5), Many(256, 2, 1, 2, 4))

MEMORY = r'.*?: "memory"\);'
REPLACED = [  # PTX -> what does the same in cuda_on_cpu.h; the last replaces what needs nothing
    (r'asm volatile\("ld\.global.*?\);', "v = *(const uint4*)address;"),
    (r'asm\("fma[^:]*: "=r"\(first\).*?\);', "first = lifted(pairs[0]);"),
    (r'asm\("fma[^:]*: "=r"\(second\).*?\);', "second = lifted(pairs[1]);"),
    (r'asm\("lop3.*?\);', "low = (codes << 4 & 0xF0F0F0F0u) | (nibbles & 0x0F0F0F0Fu);"),
    (r'asm\("cvt.*?\);', "rounded = to_bf16(value);"),
    (r'asm volatile\("" *:.*?\);', ";"),
    (r"return \(u32\)__cvta_generic_to_shared\(p\);", "return offset_of(p);"),
    (r'asm\("mapa.*?\);', "theirs = elsewhere(p, rank);"),
    (r"if constexpr \(ORDERED\).*?else.*?\);", "whole_cluster->arrive_and_wait();"),
    (r'asm volatile\("mbarrier\.init' + MEMORY, "start(shared_address(barrier), arrivals);"),
    (
        r'asm volatile\("mbarrier\.arrive\.expect_tx.*?: "memory"\);',
        "mbarrier(own(), offset_of(barrier)).arrive(1, bytes);",
    ),
    (r'asm volatile\("mbarrier\.arrive.*?: "memory"\);', "anywhere(cluster_address(barrier, rank)).arrive(1, 0);"),
    (r'asm volatile\(\s*"\{\\n.*?: "memory"\);', "mbarrier(own(), offset_of(barrier)).wait(phase);"),
    (
        r'asm volatile\(BULK_TENSOR " \[.*?: "memory"\);',
        "box(offset_of(to), matrices[map.opaque[0]], column, row, offset_of(full), 1u << rank_in_cluster);",
    ),
    (
        r'asm volatile\(BULK_TENSOR "\.multicast.*?: "memory"\);',
        "box(offset_of(to), matrices[map.opaque[0]], column, row, offset_of(full), mask);",
    ),
    (r'asm volatile\("cp\.async\.bulk\.shared.*?: "memory"\);', "::bytes(to, from, bytes, offset_of(full));"),
    (r'asm volatile\("bar\.sync 1.*?: "memory"\);', "own().consumers->arrive_and_wait();"),
    (r'asm volatile\("ld\.shared::cluster.*?: "memory"\);', "v = load_from(theirs);"),
    (r"#define D\(i\).*?(?=// What an instruction in flight)", "WGMMA\n"),
    (r"extern __shared__[^;]*;", "u8* memory = (u8*)own().memory;"),
    (r"__syncthreads\(\)", "own().all->arrive_and_wait()"),
    (r"__syncwarp\(\)", ""),
    (r'asm volatile\("[^"]*(?:wgmma|fence|setmaxnreg).*?\);', ";"),
]

WGMMA = """
template <int TILES>
void wgmma(float (&d)[TILES][4], const u32 (&a)[4], u64 x) { multiply_group(&d[0][0], TILES, a, x); }
"""

MAIN = """
template <int X, int GROUPS, int SPLIT, int SHARE, int STAGES>
void run(Weight w, const u16* x, u16* out, int m) {
    static Map map{}, plane{{1}};
    matrices[0] = {(const char*)x, m, w.k, 2, X / SHARE};
    matrices[1] = {(const char*)w.plane, w.n, w.k, 1, GROUPS * 64};
    const int tile = GROUPS * 64 * SHARE, sums = X * (GROUPS * 64 + 4) * 4;
    launch({(w.n + tile - 1) / tile * SHARE, (m + X - 1) / X, SPLIT}, SHARE, (GROUPS + 1) * 128, GROUPS,
           std::max((int)sizeof(Shared<X, GROUPS, STAGES>), sums),
           [=] { many_rows<X, GROUPS, SPLIT, SHARE, STAGES>(w, map, plane, out, m); });
}
template <class T> std::vector<T> read(FILE* file, size_t count) {
    std::vector<T> values(count + 1);
    if (fread(values.data(), sizeof(T), count, file) != count) exit(2);
    return values;
}
int main(int, char** arguments) {
    FILE* file = fopen(arguments[1], "rb");
    const auto head = read<int>(file, 4);
    const size_t n = head[0], k = head[1], m = head[2];
    const auto plane = read<u8>(file, n * k);
    const auto nibbles = read<uint4>(file, n * k / 32), escapes = read<uint4>(file, n * k / 1024);
    const auto more = read<u32>(file, head[3]);
    const auto scales = read<float>(file, n);
    const auto bias = read<u16>(file, n), x = read<u16>(file, m * k);
    std::vector<u16> out(m * n, 0x7FC0);
    const Weight w{plane.data(), nibbles.data(), escapes.data(), more.data(), scales.data(), bias.data(),
                   head[0], head[1]};
    switch (atoi(arguments[2])) { CASES }
    fwrite(out.data(), 2, out.size(), stdout);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel as a program for this machine."""
    folder = tmp_path_factory.mktemp("nested")
    package, here = resources.files("mixquant.kernels"), Path(__file__).parent
    block = package.joinpath("nested_block.cu").read_text().partition("// W as it was")[0]
    source = block + package.joinpath("nested_many_rows.cu").read_text()
    for pattern, text in REPLACED:
        source, count = re.subn(pattern, lambda _, text=text: text, source, flags=re.DOTALL)  # type: ignore[misc]
        assert count, pattern
    source = source.replace("WGMMA\n", WGMMA)
    assert "asm" not in re.sub(r"//.*", "", source)
    cases = "".join(
        f"case {i}: run<{str(tuple(s))[1:-1]}>(w, x.data(), out.data(), m); break; " for i, s in enumerate(SHAPES)
    )
    whole = f'#include "{here / "cuda_on_cpu.h"}"\n{source}{MAIN.replace("CASES", cases)}'
    (folder / "many_rows.cpp").write_text(whole)
    command = ["g++", "-std=c++20", "-O1", "-w", "-pthread", "-o", "many_rows", "many_rows.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "many_rows"


@pytest.fixture(scope="module")
def product(program: Path) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """x [rows, K] @ W.T + bias by one of the shapes."""

    def multiply(shape: int, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        split = nested.split(weight)
        escapes, more = nested_cuda.escapes_by_block(split)
        head = torch.tensor([*weight.shape, len(x), len(more)], dtype=torch.int32)
        scales = split.scales * nested_cuda.LIFT
        parts = (head, split.plane, nested_cuda.interleave(split.nibbles), escapes, more, scales, bias, x)
        raw = b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        (program.parent / "input").write_bytes(raw)
        ran = subprocess.run([program, program.parent / "input", str(shape)], capture_output=True, check=False)
        assert ran.returncode == 0, ran.stdout[:200]
        return torch.frombuffer(bytearray(ran.stdout), dtype=torch.bfloat16).view(len(x), len(weight))

    return multiply


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=lambda i: SHAPES[i].name)
def test_many_rows_multiplies(shape: int, product: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> None:
    """By a weight of a dozen escapes in a block, whose rows no CTA's tile divides and whose columns no split does."""
    torch.manual_seed(shape)
    n, k, rows = 272, 320, SHAPES[shape].x - 3
    weight = torch.randn(n, k) * 0.02
    weight[:, ::64] *= 30
    weight[::3, 5:40:2] *= 1e-6
    weight[:, 7] = 0
    weight, bias, x = weight.bfloat16(), torch.randn(n).bfloat16(), torch.randn(rows, k).bfloat16()
    truth = x.double() @ weight.double().T + bias.double()
    out = product(shape, weight, bias, x).double()
    rounded = truth.bfloat16().double()
    assert (out - truth).norm() < 1.01 * (rounded - truth).norm()
    plane = nested.split(weight).fp8.dequantize().double()
    assert (x.double() @ plane.T + bias.double() - truth).norm() > 3 * (rounded - truth).norm()
