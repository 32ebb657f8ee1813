"""Every kernel that runs on this CPU against the float64 reference of its format."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mixquant.formats import nvfp4, quantizer, scales
from mixquant.kernels import KERNELS, LinearKernel, emulation
from mixquant.kernels.cpu import Int8OneDNN, PackedOneDNN
from mixquant.kernels.cuda import FP8ScaledMM, NVFP4ScaledMM
from mixquant.kernels.dense import Dense
from mixquant.kernels.emulation import EmulatedNVFP4
from tests.formats.inputs import gaussian, same_bits
from tests.kernels.accuracy import (
    EVERYTHING,
    ROWS,
    UNIT,
    K,
    N,
    accepted,
    activations,
    build,
    eighths,
    excess,
    reference,
    roundings,
    weights,
    wrong_scale,
    wrong_sign,
)

every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{kernel.name}-{str(dtype).removeprefix('torch.')}")
        for dtype in UNIT
        for kernel in accepted(dtype)
    ],
)
in_bf16 = pytest.mark.parametrize("kernel", accepted(torch.bfloat16))


# --- the numbers ----------------------------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_kernel_is_its_reference_up_to_rounding(
    kernel: type[LinearKernel], dtype: torch.dtype, rows: int, with_bias: bool
) -> None:
    x, weight, bias = activations(dtype)[:rows], weights(dtype), eighths(dtype) if with_bias else None
    y = build(kernel, weight)(x, bias)
    assert (y.dtype, y.shape) == (dtype, (rows, N))
    assert excess(y, reference(kernel.format, x, weight), bias, roundings(kernel)) <= 1
    assert excess(y, reference(kernel.format, x, wrong_sign(weight)), bias, roundings(kernel)) > 1
    assert excess(y, reference(kernel.format, x, wrong_scale(weight)), bias, roundings(kernel)) > 1


@pytest.mark.parametrize("format", ["nvfp4", "fp8", "int8"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_float64_emulation_is_the_reference_to_the_last_bit(format: str, with_bias: bool) -> None:
    x, weight = EVERYTHING.double(), gaussian(N, EVERYTHING.shape[1], seed=1).double()
    bias = eighths(torch.float64) if with_bias else torch.zeros(N, dtype=torch.float64)
    y = build(KERNELS[format][-1], weight)(x, bias if with_bias else None)
    assert torch.equal(y, reference(format, x, weight) + bias)
    assert not torch.equal(y, reference(format, x, wrong_sign(weight)) + bias)


FOREIGN = float(torch.tensor(2688.0 / 4.66))  # a global scale as other tools write it: no power of two


@pytest.mark.parametrize(("weight_scale", "activation_scale"), [(FOREIGN, 4.0), (512.0, FOREIGN), (FOREIGN, 3.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_emulated_nvfp4_keeps_global_scales_of_other_tools(
    weight_scale: float, activation_scale: float, dtype: torch.dtype, with_bias: bool
) -> None:
    x, weight, bias = activations(dtype), weights(dtype), eighths(dtype) if with_bias else None
    stored = nvfp4.quantize(weight, torch.tensor(weight_scale))
    y = EmulatedNVFP4(stored, dtype, activation_scale)(x, bias)
    assert excess(y, nvfp4.quantize_activation(x, activation_scale).matmul(stored), bias, roundings=3) <= 1
    other = nvfp4.quantize_activation(x, activation_scale * 1.125)
    assert excess(y, other.matmul(stored), bias, roundings=3) > 1


def test_powers_of_two_leave_nothing_to_the_epilogue() -> None:
    assert build(EmulatedNVFP4, weights(torch.bfloat16)).output_scale == 1.0
    assert (
        EmulatedNVFP4(nvfp4.quantize(weights(torch.bfloat16), torch.tensor(FOREIGN)), torch.bfloat16).output_scale < 1
    )


def test_emulated_nvfp4_multiplies_operands_that_are_exact_in_bf16() -> None:
    x, weight = EVERYTHING.bfloat16(), weights(torch.bfloat16)
    held, seen = build(EmulatedNVFP4, weight).weight, emulation.fake_quant_nvfp4(x, 4.0)
    assert torch.equal(held.float(), quantizer("nvfp4")(weight).dequantize())
    assert torch.equal(seen.float(), nvfp4.quantize_activation(x).dequantize())
    foreign = nvfp4.quantize_activation(x, 3.0).dequantize()  # control: no power of two, not exact
    assert not torch.equal(foreign.bfloat16().float(), foreign)


@pytest.mark.parametrize(("rule", "other"), [("amax", "search"), ("search", "amax")])
def test_the_scale_rule_reaches_the_kernel(rule: str, other: str) -> None:
    weight, sixes = weights(torch.float64), 6 * torch.eye(K, dtype=torch.float64)  # NVFP4 holds 6 exactly
    y = EmulatedNVFP4.from_weight(weight, quantizer("nvfp4", rule))(sixes, None)
    assert torch.equal(y.T, 6 * nvfp4.quantize_weight(weight, scales.RULES[rule]).dequantize().double())
    assert not torch.equal(y.T, 6 * nvfp4.quantize_weight(weight, scales.RULES[other]).dequantize().double())


# --- rows -----------------------------------------------------------------------------------------------------------


@every_kernel
def test_a_row_does_not_see_its_batch_mates(kernel: type[LinearKernel], dtype: torch.dtype) -> None:
    x, built = activations(dtype), build(kernel, weights(dtype))
    mates = x.clone()
    mates[1:] *= 100
    y = built(x, None)
    assert torch.equal(built(mates, None)[0], y[0])
    assert not torch.equal(built(mates, None)[1], y[1])


def test_control_one_scale_for_the_batch_lets_rows_see_each_other() -> None:
    def leaky(x: Tensor) -> Tensor:
        step = x.abs().max() / 127
        return (x / step).round() * step @ weights(x.dtype).T

    mates = activations(torch.float32)
    alone = leaky(mates)[0]
    mates[1:] *= 100
    assert not torch.equal(leaky(mates)[0], alone)


@every_kernel
def test_a_row_alone_is_the_row_in_a_batch_up_to_summation_order(
    kernel: type[LinearKernel], dtype: torch.dtype
) -> None:
    x, built = activations(dtype), build(kernel, weights(dtype))
    y = built(x, None)
    alone = torch.cat([built(row, None) for row in x.split(1)])
    assert excess(alone, y.double(), roundings=2) <= 1  # both may round, in different directions
    if kernel is Int8OneDNN or (kernel.emulated and dtype is torch.float64):
        assert torch.equal(alone, y)  # integer and float64 sums do not round
    assert excess(alone.roll(1, 0), y.double(), roundings=2) > 1


# --- objects --------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A kernel between two other operations."""

    def __init__(self, kernel: LinearKernel) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.cat([self.kernel(x * 1.0, bias), x], -1)


@in_bf16
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_kernel_compiles_into_one_graph(kernel: type[LinearKernel]) -> None:
    x, weight, bias = activations(torch.bfloat16), weights(torch.bfloat16), eighths(torch.bfloat16)
    compiled = torch.compile(Model(build(kernel, weight)), fullgraph=True)
    for rows in (ROWS, 2):
        y = compiled(x[:rows], bias)[:, :N]
        assert excess(y, reference(kernel.format, x[:rows], weight), bias, roundings(kernel)) <= 1


@in_bf16
def test_copies_of_a_model_share_its_kernels(kernel: type[LinearKernel]) -> None:
    model = Model(build(kernel, weights(torch.bfloat16)))
    twin = copy.deepcopy(model)
    assert twin is not model
    assert twin.kernel is model.kernel
    assert not dict(model.named_parameters()) | dict(model.named_buffers()) | model.state_dict()


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [(kernel, dtype) for dtype in (torch.bfloat16, torch.float32) for kernel in accepted(dtype)]
    + [(FP8ScaledMM, torch.bfloat16), (NVFP4ScaledMM, torch.bfloat16)],
)
@pytest.mark.parametrize(("n", "k"), [(128, 64), (130, 80)])
def test_nbytes_foretells_the_bytes_of_the_layout(
    kernel: type[LinearKernel], dtype: torch.dtype, n: int, k: int
) -> None:
    held = build(kernel, gaussian(n, k).to(dtype)).tensors()
    assert sum(tensor.nbytes for tensor in held) == kernel.nbytes(n, k, dtype)
    assert kernel.nbytes(n + 1, k + 64, dtype) > kernel.nbytes(n, k, dtype)


@pytest.mark.parametrize("kernel", [k for k in accepted(torch.bfloat16) if k.format == "bf16"])
def test_the_checkpoints_weight_comes_back_bit_for_bit(kernel: type[Dense] | type[PackedOneDNN]) -> None:
    weight = weights(torch.bfloat16)
    assert same_bits(kernel(weight).dense(), weight)


@in_bf16
def test_nan_stays_in_its_row_and_shows(kernel: type[LinearKernel]) -> None:
    x = activations(torch.bfloat16)
    y = build(kernel, weights(torch.bfloat16))(x, None)
    x[3, 7] = torch.nan
    poisoned = build(kernel, weights(torch.bfloat16))(x, None)
    assert poisoned[3].isnan().all()
    others = [row for row in range(ROWS) if row != 3]
    assert torch.equal(poisoned[others], y[others])
