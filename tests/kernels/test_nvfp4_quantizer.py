"""NVFP4 quantizers without a GPU: their arithmetic in Triton's interpreter, their instruction as far as ptxas."""

from __future__ import annotations

import pytest

from tests.kernels import triton_apart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not triton_apart.TRITON.exists(), reason="no Triton: `make test` puts it into .venv/triton"),
]


@pytest.mark.parametrize(("kernel", "inputs"), [("quantizer", 8), ("rms_norm", 2), ("silu_mul", 2)])
def test_a_kernel_gives_the_bits_of_the_chain_that_it_stands_for(kernel: str, inputs: int) -> None:
    equal = triton_apart.run_apart(kernel)
    assert len(equal) == inputs
    for name, (codes, scales, control) in equal.items():
        assert (codes, scales, control) == (True, True, False), name


def test_emulated_activations_have_the_bits_of_the_eager_reference() -> None:
    equal = triton_apart.run_apart("fake_quantizer")
    assert len(equal) == 12
    assert set(map(tuple, equal.values())) == {(True, False)}


def test_emulation_compiles_everywhere() -> None:
    compiled = triton_apart.run_apart("compile")["fake_quantizer"]
    assert list(compiled) == ["90", "100", "103", "120", "121"]
    assert all(each["spilled"] == 0 and 8 < each["registers"] <= 64 for each in compiled.values())


@pytest.mark.parametrize("kernel", ["quantizer", "rms_norm", "silu_mul"])
def test_every_blackwell_compiles_with_its_own_rounding(kernel: str) -> None:
    compiled = triton_apart.run_apart("compile")[kernel]
    assert {name: each["target"] for name, each in compiled.items()} == {
        "90": "sm_90a", "100": "sm_100a", "103": "sm_103a", "120": "sm_120a", "121": "sm_121a",
    }  # fmt: skip
    assert compiled["90"]["conversions"] == 0  # control: plain arithmetic
    assert all(each["conversions"] > 0 for name, each in compiled.items() if name != "90")
    assert all(each["spilled"] == 0 and 8 < each["registers"] <= 64 for each in compiled.values())
