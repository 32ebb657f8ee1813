"""NVFP4 bits: vLLM's reference and compressed-tensors are the oracles, brute force is the judge of the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype, ref_nvfp4_quant
from vllm.model_executor.layers.quantization.utils.nvfp4_utils import swizzle_blockscale

from mixquant.errors import InputError
from mixquant.formats import nvfp4
from tests.formats.inputs import (
    E2M1_TIES,
    INPUTS,
    bits,
    e2m1_ties,
    gaussian,
    matrices,
    outlier_channel,
    quick,
    same_bits,
)

ALL_BYTES = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
ALL_SCALES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)  # 0 to 448; 127 is NaN
FP32 = {"width": 32, "allow_nan": False}

GLOBAL_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "power of two": lambda x: nvfp4.weight_global_scale(x.abs().amax().float()),
    "2688 / amax": lambda x: 2688.0 / x.abs().amax().float().clamp_min(1e-6),
    "static": lambda x: torch.tensor(nvfp4.ACTIVATION_GLOBAL_SCALE),
}


def vllm_bits(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(packed codes, scale bytes): vLLM's reference, which returns floats, packed by compressed-tensors."""
    values, scales = ref_nvfp4_quant(x, global_scale, nvfp4.BLOCK)
    return pack_fp4_to_uint8(values), bits(scales.to(torch.float8_e4m3fn))


def equals_vllm(q: nvfp4.NVFP4Tensor, x: Tensor) -> bool:
    codes, scales = vllm_bits(x, q.global_scale)
    return torch.equal(q.packed, codes) and torch.equal(bits(q.scales), scales)


# --- the same bits as vLLM and compressed-tensors -------------------------------------------------------------------


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES.values(), ids=GLOBAL_SCALES)
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_codes_and_scales_are_those_of_vllm(
    make: Callable[[], Tensor], global_scale: Callable[[Tensor], Tensor]
) -> None:
    x = make()
    assert equals_vllm(nvfp4.quantize(x, global_scale(x)), x)


@quick
@given(matrices())
def test_any_finite_matrix_quantizes_as_in_vllm(x: Tensor) -> None:
    assert equals_vllm(nvfp4.quantize_weight(x), x)
    assert equals_vllm(nvfp4.quantize_activation(x), x)


def _divide(x: Tensor, q: nvfp4.NVFP4Tensor) -> Tensor:
    """compressed-tensors' flavour: divisions where vLLM multiplies by reciprocals."""
    step = (q.scales.float() / q.global_scale).unsqueeze(-1)
    return nvfp4.round_e2m1((nvfp4.blocks(x) / step).flatten(-2))


def _ties_away(x: Tensor, q: nvfp4.NVFP4Tensor) -> Tensor:
    return nvfp4.round_e2m1(nvfp4.scaled_values(x, q.scales, q.global_scale) * (1.0 + 2.0**-22))


def _drop_sign_of_zero(x: Tensor, q: nvfp4.NVFP4Tensor) -> Tensor:
    return nvfp4.round_e2m1(nvfp4.scaled_values(x, q.scales, q.global_scale)) + 0.0


@pytest.mark.parametrize("flavour", [_divide, _ties_away, _drop_sign_of_zero])
def test_control_the_inputs_tell_other_flavours_apart(flavour: Callable[[Tensor, nvfp4.NVFP4Tensor], Tensor]) -> None:
    x = e2m1_ties()
    q = nvfp4.quantize(x, torch.tensor(2688.0 / 770.0))
    assert equals_vllm(q, x)
    other = nvfp4.NVFP4Tensor(nvfp4.pack(flavour(x, q)), q.scales, q.global_scale)
    assert not equals_vllm(other, x)


def test_control_the_inputs_reach_zero_subnormal_and_largest_scales() -> None:
    scales = bits(nvfp4.quantize_weight(INPUTS["tiny_blocks"]()).scales).unique().tolist()
    assert {0, 1, 2, 3, 4, 5, 6, 7} <= set(scales)
    saturated = nvfp4.quantize(INPUTS["outlier_channel"](), torch.tensor(4.0)).scales
    assert saturated.float().max() == 448.0


def test_what_is_negative_and_rounds_to_zero_becomes_minus_zero_as_in_vllm() -> None:
    block = torch.zeros(1, 16)
    block[0, :6] = torch.tensor([6.0, -6.0, 0.1, -0.1, 0.0, -0.0])
    q = nvfp4.quantize(block, torch.tensor(1.0))
    assert q.packed[0, :3].tolist() == [0xF7, 0x80, 0x00]
    assert equals_vllm(q, block)
    assert torch.equal(q.dequantize()[0, 2:6], torch.zeros(4))


def test_a_block_below_the_smallest_scale_becomes_zeros_with_signs_as_in_vllm() -> None:
    block = torch.full((1, 16), -1e-6)
    q = nvfp4.quantize(block, torch.tensor(1.0))
    assert bits(q.scales).tolist() == [[0]]
    assert q.packed.unique().tolist() == [0x88]
    assert equals_vllm(q, block)


def test_every_byte_unpacks_as_in_compressed_tensors_and_packs_back() -> None:
    values = nvfp4.unpack(ALL_BYTES)
    assert same_bits(values, unpack_fp4_from_uint8(ALL_BYTES, 16, 32, torch.float32))
    assert torch.equal(nvfp4.pack(values), ALL_BYTES)
    assert torch.equal(pack_fp4_to_uint8(values), ALL_BYTES)


def test_the_low_nibble_is_the_even_column() -> None:
    assert nvfp4.unpack(torch.tensor([[0x21]], dtype=torch.uint8)).tolist() == [[0.5, 1.0]]
    assert nvfp4.pack(torch.tensor([[0.5, -6.0]])).tolist() == [[0xF1]]


@pytest.mark.parametrize("swizzled", [False, True])
def test_dequantized_values_are_those_of_vllm(swizzled: bool) -> None:
    q = nvfp4.quantize_weight(gaussian(130, 128))
    scales = nvfp4.swizzle(q.scales) if swizzled else q.scales

    def vllm(scales: Tensor) -> Tensor:
        return dequantize_to_dtype(q.packed, scales, 1.0 / q.global_scale, torch.float32, swizzle=swizzled)

    assert torch.equal(q.dequantize(), vllm(scales))
    assert not torch.equal(q.dequantize(), vllm(scales.roll(1)))


# --- rounding and scales, judged by brute force ---------------------------------------------------------------------


@quick
@given(st.floats(**FP32) | st.floats(-7.0, 7.0, width=32) | st.sampled_from(E2M1_TIES))
def test_rounding_is_to_the_nearest_code_with_ties_to_even(value: float) -> None:
    nearest = min(range(8), key=lambda code: (abs(min(abs(value), 6.0) - nvfp4.CODES[code]), code % 2))
    assert nvfp4.round_e2m1(torch.tensor([value])).item() == math.copysign(nvfp4.CODES[nearest], value)


@quick
@given(st.floats(min_value=0.0, exclude_min=True, allow_infinity=False, **FP32))
def test_the_global_scale_is_the_largest_power_of_two_that_fits(amax: float) -> None:
    g = nvfp4.weight_global_scale(torch.tensor(amax)).item()
    assert g.hex().startswith("0x1.0000000000000p")
    assert amax * g <= 2688.0
    assert amax * g * 2 > 2688.0 or g == 2.0**117


@pytest.mark.parametrize("amax", [1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_no_magnitude_breaks_a_weight(amax: float) -> None:
    """Values that FP32 can hold become zero or stay near; nothing turns into NaN, Inf or garbage."""
    weight = torch.zeros(2, 32)
    weight[0, 0], weight[1, 16:] = amax, -amax / 4
    error = nvfp4.quantize_weight(weight).dequantize() - weight
    assert (error.abs() <= max(amax / 16, 1e-37)).all()


def test_code_times_scale_is_exact_in_bf16_for_every_code_and_scale() -> None:
    all_codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    q = nvfp4.NVFP4Tensor(all_codes.repeat(127, 1), ALL_SCALES.unsqueeze(1), torch.tensor(1.0))
    products = q.codes_times_scales()
    assert products.shape == (127, 16)
    assert torch.equal(products.bfloat16().float(), products)
    third = products / 3  # control: a global scale that is no power of two would not fit
    assert not torch.equal(third.bfloat16().float(), third)


# --- properties -----------------------------------------------------------------------------------------------------


@quick
@given(matrices())
def test_dequantized_values_lie_on_the_grid_of_their_block(x: Tensor) -> None:
    q = nvfp4.quantize_weight(x)
    step = (q.scales.double() / q.global_scale.double()).unsqueeze(-1)
    codes = nvfp4.blocks(q.dequantize().double()) / step.where(step > 0, 1.0)
    assert set(codes.abs().flatten().tolist()) <= set(nvfp4.CODES)


@quick
@given(matrices(), st.randoms(use_true_random=False))
def test_a_row_of_activations_quantizes_alike_in_any_company(x: Tensor, random: object) -> None:
    rows = random.sample(range(x.shape[0]), random.randint(1, x.shape[0]))  # type: ignore[attr-defined]
    whole, part = nvfp4.quantize_activation(x), nvfp4.quantize_activation(x[rows])
    assert torch.equal(whole.packed[rows], part.packed)
    assert same_bits(whole.scales[rows], part.scales)


def test_control_a_scale_taken_from_the_batch_depends_on_company() -> None:
    x = outlier_channel()
    x[1:] *= 100.0
    whole, alone = nvfp4.quantize_weight(x), nvfp4.quantize_weight(x[:1])
    assert not same_bits(whole.scales[:1], alone.scales)


@quick
@given(matrices())
def test_quantizing_again_changes_nothing_where_scales_are_normal(x: Tensor) -> None:
    once = nvfp4.quantize_activation(x)
    twice = nvfp4.quantize_activation(once.dequantize())
    normal = once.scales.float() >= 2.0**-6
    assert torch.equal(once.scales.float()[normal], twice.scales.float()[normal])
    values = [nvfp4.blocks(q.dequantize())[normal] for q in (once, twice)]
    assert torch.equal(*values)


def test_control_quantizing_again_changes_blocks_under_subnormal_scales() -> None:
    """Their largest code need not be 6, so the second amax asks for a smaller scale."""
    block = torch.full((1, 16), 3.1 * 2.0**-9)
    once = nvfp4.quantize(block, torch.tensor(1.0))
    twice = nvfp4.quantize(once.dequantize(), torch.tensor(1.0))
    assert once.dequantize().any()
    assert not twice.dequantize().any()


# --- swizzle --------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (5, 3), (32, 4), (128, 4), (129, 5), (300, 21)]


def scale_bytes(rows: int, cols: int) -> Tensor:
    """Random scale bytes, none of them zero: zeros are padding."""
    generator = torch.Generator().manual_seed(rows * cols)
    return torch.randint(1, 127, (rows, cols), generator=generator, dtype=torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_swizzle_follows_the_documented_byte_formula(rows: int, cols: int) -> None:
    scales, flat = scale_bytes(rows, cols), torch.zeros(-(-rows // 128) * 128 * -(-cols // 4) * 4, dtype=torch.uint8)
    for r in range(rows):
        for c in range(cols):
            tile = (r // 128) * -(-cols // 4) + c // 4
            flat[tile * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4] = bits(scales)[r, c]
    assert torch.equal(bits(nvfp4.swizzle(scales)), flat)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_swizzle_is_that_of_vllm(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda self: self)  # vLLM's moves its result to the GPU
    scales = scale_bytes(rows, cols)
    theirs = bits(swizzle_blockscale(scales)).flatten()
    assert torch.equal(bits(nvfp4.swizzle(scales)), theirs)
    assert rows * cols == 1 or not torch.equal(bits(nvfp4.swizzle(scales.roll(1))), theirs)


# --- what the static activation scale covers, and bad input ---------------------------------------------------------


def test_activation_range_counts_the_blocks_that_it_misses() -> None:
    covered = nvfp4.activation_range(torch.ones(1, 16))
    below, above = covered.lowest / 4, covered.highest * 1.01
    maxima = torch.tensor([0.0, below, covered.lowest, 1.0, covered.highest, above, above])
    found = nvfp4.activation_range(maxima.repeat_interleave(16).reshape(1, -1))
    assert (found.blocks, found.underflow, found.overflow) == (7, 1, 2)
    assert (covered.blocks, covered.underflow, covered.overflow) == (1, 0, 0)


def test_activation_range_is_what_the_constant_promises() -> None:
    covered = nvfp4.activation_range(torch.ones(1, 16))
    assert (covered.lowest, covered.highest) == (pytest.approx(0.0029, rel=0.02), 672.0)
    shifted = nvfp4.activation_range(torch.ones(1, 16), global_scale=8.0)
    assert (shifted.lowest, shifted.highest) == (covered.lowest / 2, covered.highest / 2)


@pytest.mark.parametrize("quantize", [nvfp4.quantize_weight, nvfp4.quantize_activation])
@pytest.mark.parametrize(
    ("x", "remedy"),
    [
        (torch.ones(2, 24), "multiple of 16, not 24: add the layer to `ignore`"),
        (torch.ones(2, 0), "multiple of 16, not 0: add the layer to `ignore`"),
        (torch.ones(16), r"matrices \[rows, K\], not a tensor of shape \(16,\)"),
        (torch.ones(2, 2, 16), r"matrices \[rows, K\], not a tensor of shape \(2, 2, 16\)"),
        (torch.full((1, 16), torch.nan), "16 NaN or Inf values: use an intact checkpoint"),
        (torch.eye(16).where(torch.eye(16) > 0, -torch.inf), "240 NaN or Inf values: use an intact checkpoint"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(quantize: Callable[[Tensor], object], x: Tensor, remedy: str) -> None:
    with pytest.raises(InputError, match=remedy):
        quantize(x)
