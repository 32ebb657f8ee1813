"""Every kernel that runs on this CPU against the float64 reference of its format.

Tolerances are derived, not tuned. A kernel rounds its result to the model's dtype once, or as often as its docstring
says, each time by at most one unit of the value; scales and bias are up to four float32 units more; and sums of K exact
products in float32 are off by at most K units of the sum of magnitudes (twice the originals', to cover quantized ones).
Float64 emulation is exact: its codes have so few bits that no sum rounds. Every comparison has a control, which is
wrong by one code or one scale.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from mixquant.formats import FORMATS, fp8, int8, nvfp4, quantizer, scales
from mixquant.formats.nvfp4 import ACTIVATION_GLOBAL_SCALE
from mixquant.kernels import KERNELS, Accepted, LinearKernel, cpu, cuda, dense, emulation, fusion
from mixquant.kernels.base import PlainKernel, QuantizedKernel
from mixquant.kernels.cpu import Int8OneDNN, PackedOneDNN
from mixquant.kernels.cuda import FP8ScaledMM, NVFP4ScaledMM
from mixquant.kernels.dense import Dense
from mixquant.kernels.emulation import EmulatedFP8, EmulatedInt8, EmulatedNVFP4
from tests.formats.inputs import INPUTS, gaussian, same_bits

CPU = torch.device("cpu")
ROWS, N, K = 9, 40, 96
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}

EVERYTHING = torch.cat([make().float() for make in INPUTS.values()])

ALL = [kernel for kernels in KERNELS.values() for kernel in kernels]


def accepted(dtype: torch.dtype) -> list[type[LinearKernel]]:
    """The kernels that run here for a model of `dtype`."""
    return [kernel for kernel in ALL if isinstance(kernel.check(CPU, dtype), Accepted)]


every_kernel = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{kernel.name}-{str(dtype).removeprefix('torch.')}")
        for dtype in UNIT
        for kernel in accepted(dtype)
    ],
)
in_bf16 = pytest.mark.parametrize("kernel", accepted(torch.bfloat16))


def activations(dtype: torch.dtype) -> Tensor:
    return gaussian(ROWS, K).to(dtype)


def weights(dtype: torch.dtype) -> Tensor:
    return gaussian(N, K, seed=1).to(dtype)


def eighths(dtype: torch.dtype) -> Tensor:
    """A bias that is exact in every dtype and whose sums with codes are exact in float64."""
    return (torch.arange(N, dtype=dtype) - N // 2) / 8


def build(kernel: type[LinearKernel], weight: Tensor) -> LinearKernel:
    """A kernel for a model's weight, quantized as policies do by default."""
    if issubclass(kernel, QuantizedKernel):
        return kernel.from_weight(weight, quantizer(kernel.format))
    assert issubclass(kernel, PlainKernel)
    return kernel(weight)


def reference(format: str, x: Tensor, weight: Tensor) -> Tensor:
    """The truth in float64 [rows, N]."""
    if format == "bf16":
        return x.double() @ weight.double().T
    return FORMATS[format].quantize_input(x, ACTIVATION_GLOBAL_SCALE).matmul(quantizer(format)(weight))


def excess(y: Tensor, truth: Tensor, bias: Tensor | None = None, roundings: int = 1) -> float:
    """The largest error of y in tolerances: at most 1 if the kernel is right."""
    bias = torch.zeros(N) if bias is None else bias
    values = truth.abs() + bias.double().abs()
    magnitudes = 2 * activations(torch.float64)[: len(y)].abs() @ weights(torch.float64).abs().T
    single = UNIT[torch.float32]
    tolerance = roundings * UNIT[y.dtype] * values + 4 * single * values + K * single * magnitudes
    return float(((y.double() - truth - bias.double()).abs() / tolerance).max())


def roundings(kernel: type[LinearKernel]) -> int:
    """How often a kernel rounds to the model's dtype: emulated FP8 and INT8 do it before the scales too."""
    return 2 if kernel in (EmulatedFP8, EmulatedInt8) else 1


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


def wrong_sign(weight: Tensor) -> Tensor:
    """One code of the weight is another, no scale is."""
    weight = weight.clone()
    weight[3, weight[3].abs().argmax()] *= -1
    return weight


def wrong_scale(weight: Tensor) -> Tensor:
    """One output channel is an eighth larger: one step of an E4M3 scale, or so."""
    weight = weight.clone()
    weight[3] *= 1.125
    return weight


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


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs from other tests, and an error where one function is compiled too often to go on compiling it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


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


# --- BF16 without BF16 instructions -----------------------------------------------------------------------------------


@pytest.fixture
def plain_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without BF16 instructions: FP32 products run on any."""
    monkeypatch.setattr(dense, "has_bf16", lambda: False)


@pytest.mark.usefixtures("plain_cpu")
@pytest.mark.parametrize("rows", [1, dense.WIDENED_ROWS - 1, dense.WIDENED_ROWS, 40])
@pytest.mark.parametrize("biased", [False, True])
def test_widened_products_are_rounded_once(rows: int, biased: bool) -> None:
    x, weight = gaussian(rows, K).to(torch.bfloat16), weights(torch.bfloat16)
    bias = eighths(torch.bfloat16) if biased else None
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    sums = x.double().abs() @ weight.double().abs().T * K * UNIT[torch.float32]
    limit = exact.abs() * UNIT[torch.bfloat16] + sums
    for product in (Dense(weight)(x, bias), dense.widened_linear(x, weight, bias)):
        assert product.dtype is torch.bfloat16
        assert ((product.double() - exact).abs() <= limit).all()
    other = dense.widened_linear(x.roll(1, dims=1), weight, bias).double()
    assert not ((other - exact).abs() <= limit).all()  # control


@pytest.mark.usefixtures("plain_cpu")
def test_a_model_that_was_not_converted_gets_the_fastest_products() -> None:
    """Every nn.Linear of BF16, and only those; batches keep their shape."""
    layer, other = nn.Linear(K, N).to(torch.bfloat16), nn.Linear(K, N)
    x = gaussian(40, K).to(torch.bfloat16).view(2, 20, K)
    seen: list[tuple[int, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "widened_linear", lambda x, w, b: seen.append(x.shape) or nn.functional.linear(x, w, b))
        dense.use_fastest_linear_(nn.ModuleList([layer, other]), CPU)
        assert layer(x).shape == (2, 20, N)
        other(x.float())
    assert seen == [(2, 20, K)]
    assert dense.widened_linear(x, layer.weight, layer.bias).shape == (2, 20, N)


# --- fused quantizers -----------------------------------------------------------------------------------------------

G, STEP = torch.tensor(4.0), torch.tensor(0.25)
FUSED: dict[str, tuple[Callable[..., object], Callable[[Tensor], tuple[Tensor, ...]]]] = {
    "int8 codes": (cpu._quantize_u8, lambda x: (x,)),
    "int8 epilogue": (cpu._scale_rows, lambda x: (x.float(), x.float().abs().amax(-1, keepdim=True), x[0])),
    "fp8 codes": (cuda._quantize_fp8, lambda x: (x,)),
    "nvfp4 scales": (emulation._block_scales, lambda x: (x.reshape(-1, 16), G)),
    "nvfp4 values": (
        emulation._fake_quant_blocks,
        lambda x: (x.reshape(-1, 16), nvfp4.block_scales(x.float().reshape(-1, 16), G), G, STEP),
    ),
}

needs_compiler = pytest.mark.skipif(fusion.fusion_backend("cpu") == "eager", reason="no C++ compiler to fuse with")


def tensors(result: object) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)  # type: ignore[return-value]


@needs_compiler
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("function", "arguments"), FUSED.values(), ids=FUSED)
def test_fused_and_eager_quantizers_give_the_same_bits(
    function: Callable[..., object], arguments: Callable[[Tensor], tuple[Tensor, ...]], dtype: torch.dtype
) -> None:
    eager = function.__wrapped__  # type: ignore[attr-defined]
    for rows in (len(EVERYTHING), 5, 1):
        given = arguments(EVERYTHING[-rows:].to(dtype))
        assert all(map(same_bits, tensors(function(*given)), tensors(eager(*given))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2)  # one for any number of rows, one for one


def test_quantizers_of_kernels_give_the_bits_of_the_format() -> None:
    codes, row_scales = cpu._quantize_u8(EVERYTHING)
    assert torch.equal(codes.int() - int8.ZERO_POINT, int8.quantize(EVERYTHING).codes.int())
    assert same_bits(row_scales, int8.quantize(EVERYTHING).scales)
    codes, row_scales = cuda._quantize_fp8(EVERYTHING)
    assert same_bits(codes, fp8.quantize(EVERYTHING).codes)
    assert same_bits(row_scales, fp8.quantize(EVERYTHING).scales)
    codes, block_scales = cuda._quantize_nvfp4(EVERYTHING, float(G))  # on CUDA, a kernel: test_nvfp4_quantizer
    assert same_bits(codes, nvfp4.quantize_activation(EVERYTHING).packed)
    assert same_bits(block_scales, nvfp4.swizzle(nvfp4.quantize_activation(EVERYTHING).scales))


def test_control_the_inputs_tell_divisions_from_reciprocals() -> None:
    """The last bit of a quotient decides where some of these values go, so a compiler that reassociates would show."""
    q = int8.quantize(EVERYTHING)
    assert not torch.equal(torch.round(EVERYTHING / q.scales), q.codes.float())
    q = fp8.quantize(EVERYTHING)
    assert not same_bits((EVERYTHING / q.scales).to(torch.float8_e4m3fn), q.codes)


@pytest.mark.parametrize("kernel", accepted(torch.float32))
def test_without_a_compiler_a_kernel_gives_the_same_bits(
    kernel: type[LinearKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, built = activations(torch.float32), build(kernel, weights(torch.float32))
    y = built(x, None)
    monkeypatch.setattr(fusion, "fusion_backend", lambda device_type: "eager")
    assert same_bits(built(x, None), y)


# --- CUDA kernels, as far as a CPU can prove them -------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_scaled_mm_is_the_reference_where_torch_runs_it_on_cpu(with_bias: bool) -> None:
    x, weight = activations(torch.bfloat16), weights(torch.bfloat16)
    bias = eighths(torch.bfloat16) if with_bias else None
    y = build(FP8ScaledMM, weight)(x, bias)
    assert excess(y, reference("fp8", x, weight), bias) <= 1
    assert excess(y, reference("fp8", x, wrong_sign(weight)), bias) > 1


def nvfp4_on(device: str, weight: Tensor) -> NVFP4ScaledMM:
    q = nvfp4.quantize_weight(weight, scales.search)
    stored = nvfp4.NVFP4Tensor(q.packed.to(device), q.scales.to(device), q.global_scale.to(device))
    return NVFP4ScaledMM(stored, torch.bfloat16)


@pytest.mark.parametrize(("rows", "n", "k"), [(1, 32, 64), (9, 160, 96), (130, 128, 256)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_nvfp4_scaled_mm_passes_the_checks_of_torch(rows: int, n: int, k: int, with_bias: bool) -> None:
    """On the meta device torch checks the shapes, dtypes and strides of a call as CUDA would get it."""
    kernel = nvfp4_on("meta", gaussian(n, k).bfloat16())
    bias = torch.empty(n, dtype=torch.bfloat16, device="meta") if with_bias else None
    y = kernel(torch.empty(rows, k, dtype=torch.bfloat16, device="meta"), bias)
    assert (y.shape, y.dtype) == ((rows, n), torch.bfloat16)
    kernel.weight_scales = kernel.weight_scales[:-1]
    with pytest.raises((RuntimeError, ValueError), match="scale"):
        kernel(torch.empty(rows, k, dtype=torch.bfloat16, device="meta"), bias)


def unswizzled(flat: Tensor, rows: int, cols: int) -> Tensor:
    """[rows, cols] out of cuBLAS' tiled order, by its formula."""
    r, c = torch.arange(rows)[:, None], torch.arange(cols)
    tile = (r // 128) * -(-cols // 4) + c // 4
    return flat[tile * 512 + (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4]


def scaled_mm_by_the_book(a: Tensor, b: Tensor, *, scale_a: list[Tensor], scale_b: list[Tensor], **_: object) -> Tensor:
    """What scaled_mm computes, in float64, from nothing but its operands."""

    def values(packed: Tensor, scale: list[Tensor]) -> Tensor:
        packed = packed.view(torch.uint8)
        rows, k = packed.shape[0], packed.shape[1] * 2
        blocks = unswizzled(scale[0], rows, k // 16).double()
        return nvfp4.unpack(packed).double() * blocks.repeat_interleave(16, 1) * scale[1].double()

    return values(a, scale_a) @ values(b.t(), scale_b).T


def test_nvfp4_scaled_mm_gets_operands_that_stand_for_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = activations(torch.bfloat16), weights(torch.bfloat16)
    monkeypatch.setattr(nn.functional, "scaled_mm", scaled_mm_by_the_book)
    y = nvfp4_on("cpu", weight)(x, None)
    assert excess(y, reference("nvfp4", x, weight)) <= 1
    assert excess(y, reference("nvfp4", x, wrong_sign(weight))) > 1


@in_bf16
def test_nan_stays_in_its_row_and_shows(kernel: type[LinearKernel]) -> None:
    x = activations(torch.bfloat16)
    y = build(kernel, weights(torch.bfloat16))(x, None)
    x[3, 7] = torch.nan
    poisoned = build(kernel, weights(torch.bfloat16))(x, None)
    assert poisoned[3].isnan().all()
    others = [row for row in range(ROWS) if row != 3]
    assert torch.equal(poisoned[others], y[others])
