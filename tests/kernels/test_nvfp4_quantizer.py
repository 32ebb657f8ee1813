"""The NVFP4 quantizer without a GPU: its arithmetic in Triton's interpreter, its instruction as far as ptxas."""

from __future__ import annotations

import pytest

from tests.kernels import triton_apart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not triton_apart.TRITON.exists(), reason="no Triton: `make test` puts it into .venv/triton"),
]


def test_the_kernel_gives_the_bits_of_the_format() -> None:
    equal = triton_apart.run_apart("quantizer")
    assert len(equal) == 8
    for name, (codes, scales, control) in equal.items():
        assert (codes, scales, control) == (True, True, False), name


def test_every_blackwell_compiles_with_its_own_rounding() -> None:
    compiled = triton_apart.run_apart("compile")["quantizer"]
    assert {name: each["target"] for name, each in compiled.items()} == {
        "90": "sm_90a", "100": "sm_100a", "103": "sm_103a", "120": "sm_120a", "121": "sm_121a",
    }  # fmt: skip
    assert compiled["90"]["conversions"] == 0  # control: plain arithmetic
    assert all(each["conversions"] > 0 for name, each in compiled.items() if name != "90")
    assert all(each["spilled"] == 0 and 8 < each["registers"] <= 64 for each in compiled.values())
