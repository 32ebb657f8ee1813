"""The NVFP4 product by Triton without a GPU: its addresses and masks in the interpreter, its instructions up to ptxas.

Triton's interpreter has no `dot_scaled`. The tests give it one that decodes its operands by the format's reference, so
what is shown is that the kernel hands the right codes and scales to it, and what it makes of the sums.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from benchmarks import ahead_of_time

from mixquant.kernels.cuda import TRITON_FOR_FP4
from tests.kernels import triton_apart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not triton_apart.TRITON.exists(), reason="no Triton: `make test` puts it into .venv/triton"),
]

SHARED = {"100": 227 << 10, "103": 227 << 10, "120": 99 << 10, "121": 99 << 10}
"""Bytes of shared memory that a block may have."""


def test_the_kernel_gives_the_product_of_the_reference() -> None:
    errors = triton_apart.run_apart("product")
    assert len(errors) == 4
    for shape, (error, control) in errors.items():
        assert error <= 1 < control, shape


@pytest.mark.parametrize("triton", [triton_apart.TRITON, triton_apart.NEXT_TRITON], ids=lambda path: path.name)
def test_triton_makes_the_fp4_instruction_of_each_blackwell(triton: Path) -> None:
    compiled = triton_apart.run_apart("compile", triton)
    version = tuple(int(part) for part in compiled["triton"].split(".")[:2])
    for (major, minor), needed in TRITON_FOR_FP4.items():
        name = f"{major}{minor}"
        found = compiled["product"][name]
        if version < needed:
            assert set(found) == {"error"}, name
            continue
        (instruction,) = found["products"]
        kind = "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale" if major == 10 else "mma.sync.aligned.m16n8k64"
        assert instruction.startswith(kind), name
        assert "kind::mxf4nvf4.block_scale" in instruction
        assert re.search(r"scale_vec::4X|block16", instruction)  # a scale for each 16 codes
        assert found["target"] == f"sm_{name}a"
        assert (found["spilled"], found["registers"] <= 255) == (0, True), name
        assert found["shared"] <= SHARED[name], name


def test_control_hopper_gets_no_fp4_instruction() -> None:
    found = triton_apart.run_apart("compile")["product"]["90"]
    assert "error" in found or not any("mxf4" in instruction for instruction in found["products"])


def test_the_page_holds_the_table_of_what_was_compiled() -> None:
    """All of Triton's, which is pinned; of NVRTC's, which is not, all but the registers."""
    page = (Path(__file__).parents[2] / "docs/kernels.md").read_text(encoding="utf-8")
    assert "\n".join(map(ahead_of_time.line, ahead_of_time.by_triton())) in page
    for *start, _, spilled in ahead_of_time.by_nvrtc():
        assert re.search(re.escape(ahead_of_time.line(start)) + rf" ≤ \d+ \| {spilled} \|", page), start
