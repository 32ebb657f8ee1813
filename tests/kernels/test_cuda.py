"""CUDA kernels against the float64 references; skipped without a GPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from benchmarks.nested_ablation import compile_edited
from transformers import CompileConfig, Qwen3Config, Qwen3ForCausalLM

import mixquant
from mixquant import kernels
from mixquant.formats import fp8, nested, nvfp4
from mixquant.kernels import emulation, nested_cuda, nested_split, nvrtc
from mixquant.kernels.base import Accepted
from mixquant.kernels.cuda import FP8ScaledMM, NVFP4DotScaled, NVFP4ScaledMM
from mixquant.kernels.nested_cuda import NestedCUDA
from tests.formats.inputs import INPUTS, same_bits
from tests.formats.test_nested import WEIGHTS
from tests.kernels import nested_layout
from tests.model import deferring

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = torch.device("cuda")


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.double().cpu() - reference.cpu()).norm() / reference.cpu().norm())


@pytest.fixture(scope="module")
def plain() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(DEVICE, torch.bfloat16).eval()


@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fp8_equals_the_reference(rows: int, with_bias: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(384, 256, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(rows, 256, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(384, device=DEVICE, dtype=torch.bfloat16) if with_bias else None
    reference = fp8.quantize(x).matmul(fp8.quantize(weight))
    if bias is not None:
        reference = reference + bias.double()
    # One BF16 rounding of the output is 2^-9 at most, 1.7e-3 in the norm; the control is what FP8 itself costs.
    assert relative_error(FP8ScaledMM.from_weight(weight, fp8.quantize)(x, bias), reference) < 3e-3
    unquantized = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative_error(unquantized, reference) > 1e-2


def test_fp8_rows_are_independent() -> None:
    weight = torch.randn(384, 256, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(64, 256, device=DEVICE, dtype=torch.bfloat16)
    kernel = FP8ScaledMM.from_weight(weight, fp8.quantize)
    mates = torch.cat([x[:8], 1000 * x[8:]])
    assert torch.equal(kernel(x, None)[:8], kernel(mates, None)[:8])


def test_selection_prefers_native_kernels() -> None:
    assert kernels.select("fp8", DEVICE, torch.bfloat16) is FP8ScaledMM
    assert kernels.resolve_format("auto", DEVICE, torch.bfloat16) in ("fp8", "nvfp4")
    if torch.cuda.get_device_capability() < (10, 0):
        assert kernels.select("nvfp4", DEVICE, torch.bfloat16).emulated


@pytest.mark.parametrize("policy", ["fp8", "nvfp4", "int8"])
@pytest.mark.parametrize(
    "mode", [{}, {"cache_implementation": "static", "compile_config": CompileConfig(fullgraph=True)}]
)
def test_generate_hands_the_prompt_to_a_bf16_decode(
    plain: Qwen3ForCausalLM, policy: str, mode: dict[str, object]
) -> None:
    """The first logits are those of a hand-over from an all-quantized model to the plain one."""
    phase = mixquant.convert_(copy.deepcopy(plain), f"{policy},tail=1")
    uniform = mixquant.convert_(copy.deepcopy(plain), f"uniform-{policy}")
    ids = torch.randint(0, 256, (1, 100), device=DEVICE)
    with torch.inference_mode():
        cache = uniform(ids[:, :-1], use_cache=True).past_key_values
        step, expected = ids[:, -1:], []
        for _ in range(16):
            logits = plain(step, past_key_values=cache).logits[:, -1]
            expected.append(logits.float())
            step = logits.argmax(-1, keepdim=True)
    common = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    out = phase.generate(ids, max_new_tokens=16, min_new_tokens=16, **common, **mode)
    all_quantized = uniform.generate(ids, max_new_tokens=16, min_new_tokens=16, **common)
    first = slice(0, 1)  # BF16 ties may part the token paths later; the first logits see the whole prompt's KV cache
    difference = (torch.stack(out.logits)[first] - torch.stack(expected)[first]).abs().max()
    control = (torch.stack(all_quantized.logits)[first] - torch.stack(expected)[first]).abs().max()
    assert difference < control / 2
    assert mixquant.explain(phase)[0]["decode"]["format"] == "bf16"


def awkward(n: int, k: int) -> torch.Tensor:
    """A weight [n, k] of all that a nested one has to hold: a dozen escapes in a block, zeros, rows of nothing."""
    weight = torch.randn(n, k, device=DEVICE) * 0.02
    weight[:, ::64] *= 30
    weight[::3, 5:40:2] *= 1e-6
    weight[:, 7], weight[1], weight[2] = 0.0, 0.0, -0.0
    return weight.bfloat16()


@pytest.fixture
def escapes_abound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has escapes nests."""
    monkeypatch.setattr(nested, "MOST_ESCAPES", 1.0)


def by_kernel(weight: torch.Tensor) -> NestedCUDA:
    laid_out = nested_split.split(weight)
    assert not isinstance(laid_out, str), laid_out
    return NestedCUDA(laid_out)


AWKWARD = {f"awkward {n} x {k}": (n, k) for n, k in [(16, 64), (48, 192), (272, 1088), (4096, 4096), (16, 12288)]}


@pytest.mark.usefixtures("escapes_abound")
@pytest.mark.parametrize("name", [*(name for name in WEIGHTS if name != "one_huge"), "every bit pattern", *AWKWARD])
def test_a_weight_laid_out_by_the_kernel_has_the_reference_s_bits(name: str) -> None:
    torch.manual_seed(0)
    weight = awkward(*AWKWARD[name]) if name in AWKWARD else WEIGHTS.get(name, every_bit_pattern()).to(DEVICE)
    split = nested.split(weight)
    found = nested_split.split(weight)
    assert not isinstance(found, str), found
    for field, value in vars(nested_layout.lay_out(split)).items():
        assert same_bits(getattr(found, field), value), field
    assert not same_bits(found.nibbles, nested_layout.interleave(split.nibbles ^ 1))


def every_bit_pattern() -> torch.Tensor:
    """Of less than 2, beside which any other can be lifted; in each row of all magnitudes."""
    bits = torch.arange(0x4000)
    return torch.cat([bits, bits - 0x8000]).to(torch.int16).view(torch.bfloat16).view(256, 128).T.contiguous()


def test_laying_a_weight_out_takes_no_temporary_of_its_size() -> None:
    weight = torch.randn(8192, 4096, device=DEVICE).bfloat16()
    nested_split.split(weight)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = nested_split.split(weight)
    held = torch.cuda.memory_allocated() - before
    assert held < weight.nbytes * 0.77
    assert torch.cuda.max_memory_allocated() - before < held + weight.nbytes // 32
    del kept


@pytest.mark.usefixtures("escapes_abound")
@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 192), (272, 1088), (4096, 4096)])
def test_a_nested_product_differs_from_cublas_by_the_order_of_its_sum(n: int, k: int) -> None:
    torch.manual_seed(0)
    weight, bias = awkward(n, k), torch.randn(n, device=DEVICE, dtype=torch.bfloat16)
    kernel = by_kernel(weight)
    plane = kernel.fp8.dequantize().double()
    for rows in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 200, 256, 300):
        x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
        for added in (bias, None):
            truth = torch.nn.functional.linear(x.double(), weight.double(), None if added is None else added.double())
            by_cublas = relative_error(torch.nn.functional.linear(x, weight, added), truth)
            assert relative_error(kernel(x, added), truth) < 1.05 * by_cublas, (rows, added is None)
        assert relative_error(x.double() @ plane.T, truth) > 3 * by_cublas


SHAPES = [shape for table in (nested_cuda.FEW, nested_cuda.MANY) for shapes in table.values() for shape in shapes]


@pytest.mark.usefixtures("escapes_abound")
@pytest.mark.parametrize("shape", [s for s in SHAPES if not isinstance(s, int)], ids=lambda shape: shape.name)
def test_every_kernel_takes_every_weight(shape: nested_cuda.Few | nested_cuda.Many) -> None:
    """Also one that it is not chosen for: fewer columns than CTAs that share them, fewer rows of W than one takes."""
    most = shape.x * (8 if isinstance(shape, nested_cuda.Few) else 1)
    for n, k in [(16, 64), (272, 1088), (1040, 576)]:
        weight = awkward(n, k)
        kernel = by_kernel(weight)
        if shape.name not in nested_cuda.kernels(kernel.architecture):
            pytest.skip(f"{kernel.architecture} does not have it")
        for rows in (1, most - 3, most, most + 5):
            x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
            out = torch.full((rows, n), torch.nan, device=DEVICE, dtype=torch.bfloat16)
            kernel.start(shape.launch(rows, n), kernel.module, x, out, None)
            truth = x.double() @ weight.double().T
            by_cublas = relative_error(torch.nn.functional.linear(x, weight), truth)
            assert relative_error(out, truth) < 1.05 * by_cublas, (n, k, rows)


@pytest.mark.usefixtures("escapes_abound")
def test_a_nested_weight_comes_back_bit_for_bit() -> None:
    weight = awkward(272, 1088)
    assert same_bits(by_kernel(weight).dense(), weight)
    split = nested.split(weight)
    bare = replace(split, escapes=nested.split(torch.zeros_like(weight)).escapes)
    assert not same_bits(NestedCUDA(nested_layout.lay_out(bare)).dense(), weight)


@pytest.mark.usefixtures("escapes_abound")
def test_a_nested_product_can_be_captured() -> None:
    weight = awkward(256, 512)
    kernel, x = by_kernel(weight), torch.randn(32, 512, device=DEVICE, dtype=torch.bfloat16)
    expected = [kernel(x[:rows], None) for rows in (1, 32)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = [kernel(x[:rows], None) for rows in (1, 32)]
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(out, expected, strict=True))


BESIDE = nested_cuda.Many(32, 2, 4, 6)


@pytest.mark.parametrize(
    ("rows", "shape", "waits"),
    [(rows, None, waits) for rows in (1, 8, 16) for waits in (True, False)]
    + [(32, BESIDE, True), (32, BESIDE, False), (64, None, True)],
)
@pytest.mark.parametrize("buffers", [2, 24])
def test_products_that_start_early_wait_for_each_other(
    rows: int, shape: nested_cuda.Many | None, waits: bool, buffers: int
) -> None:
    """Each multiplies what the one before it has written. Without the kernels' wait it finds what stood there, if CTAs
    of both fit beside each other: of many_rows only those of two groups do."""
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("kernels start early from Hopper on")
    torch.manual_seed(0)
    layers = [by_kernel((torch.randn(1024, 1024, device=device) / 32).bfloat16()) for _ in range(24)]
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    launch = shape.launch(rows, 1024) if shape else nested_cuda.plan(rows, 1024, "sm_90a", multiprocessors)
    assert launch is not None
    edits = () if waits else [("wait_for_before();", ";")]
    module = nvrtc.Module(compile_edited(edits, launch.kernel), device)
    module.function(launch.kernel, launch.shared_bytes)
    x = torch.randn(rows, 1024, device=device, dtype=torch.bfloat16)
    outs = [torch.empty_like(x) for _ in range(buffers)] * (len(layers) // buffers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for kernel, before, out in zip(layers, [x, *outs], outs, strict=False):
            kernel.start(launch, module, before, out, None)
    right = True
    for _ in range(20):
        x.normal_()
        for out in outs:
            out.fill_(torch.nan)
        graph.replay()
        found, expected = outs[-1].clone(), x
        for kernel in layers:
            out = torch.empty_like(x)
            kernel.start(launch, module, expected, out, None)
            torch.cuda.synchronize()
            expected = out
        right &= torch.equal(found, expected)
    assert right == waits


@pytest.mark.usefixtures("escapes_abound")
def test_a_compiled_nested_product_is_replayed_by_a_graph() -> None:
    kernel = by_kernel(awkward(256, 512))
    compiled = torch.compile(lambda x: kernel(x + 1, None) * 2, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # compiled, warmed up, captured, replayed
        x = torch.randn(3, 512, device=DEVICE, dtype=torch.bfloat16)
        assert torch.equal(compiled(x).clone(), kernel(x + 1, None) * 2)
        assert not torch.equal(compiled(x).clone(), kernel(x, None) * 2)


@pytest.mark.parametrize("global_scale", [4.0, 3.7])
@pytest.mark.parametrize("name", INPUTS)
def test_nvfp4_activations_have_the_bits_of_the_format(name: str, global_scale: float) -> None:
    """By plain arithmetic on every GPU, and by its own instruction where it has one."""
    from mixquant.kernels import nvfp4_quantizer

    x = INPUTS[name]()
    reference, control = (nvfp4.quantize(x, torch.tensor(scale)) for scale in (global_scale, global_scale * 1.3))
    for hardware in {False, nvfp4_quantizer.rounds_in_hardware(DEVICE)}:
        codes, scales = nvfp4_quantizer.quantize(x.to(DEVICE), global_scale, hardware)
        assert same_bits(codes.cpu(), reference.packed)
        assert same_bits(scales.cpu(), nvfp4.swizzle(reference.scales))
    assert same_bits(reference.scales, control.scales) == (name == "all_zero")


@pytest.mark.parametrize("global_scale", [4.0, 3.7])
@pytest.mark.parametrize("name", INPUTS)
def test_emulated_nvfp4_activations_have_the_bits_of_the_eager_reference(name: str, global_scale: float) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x = INPUTS[name]().to(dtype)
        expected = emulation.fake_quant_nvfp4(x, global_scale)  # on the CPU: loops that its own tests compare
        assert same_bits(emulation.fake_quant_nvfp4(x.to(DEVICE), global_scale).cpu(), expected)
        control = emulation.fake_quant_nvfp4(x, global_scale * 1.3)
        assert same_bits(control, expected) == (name == "all_zero")


@pytest.mark.parametrize("kernel", [NVFP4ScaledMM, NVFP4DotScaled])
@pytest.mark.parametrize("rows", [1, 7, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_nvfp4_equals_the_reference(kernel: type[NVFP4ScaledMM], rows: int, with_bias: bool) -> None:
    verdict = kernel.check(DEVICE, torch.bfloat16)
    if not isinstance(verdict, Accepted):
        pytest.skip(verdict.reason)
    torch.manual_seed(0)
    weight = torch.randn(400, 1120, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(rows, 1120, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(400, device=DEVICE, dtype=torch.bfloat16) if with_bias else None
    reference = nvfp4.quantize_activation(x).matmul(nvfp4.quantize_weight(weight))
    if bias is not None:
        reference = reference + bias.double()
    assert relative_error(kernel.from_weight(weight, nvfp4.quantize_weight)(x, bias), reference) < 3e-3
    unquantized = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert relative_error(unquantized, reference) > 3e-2


def differing(found: tuple[torch.Tensor, torch.Tensor], chain: torch.Tensor, global_scale: float) -> list[float]:
    """Shares of bytes of codes, and of scales in tiles, that are not those of a chain's result."""
    expected = nvfp4.quantize_activation(chain, global_scale)
    pairs = zip(found, (expected.packed, nvfp4.swizzle(expected.scales)), strict=True)
    return [float((one.view(torch.uint8) != other.view(torch.uint8)).double().mean()) for one, other in pairs]


@pytest.mark.parametrize("shape", [(300, 1120), (2048, 4096)])
def test_nvfp4_after_a_norm_and_a_swiglu_has_the_bits_of_the_chain(shape: tuple[int, int]) -> None:
    """But for one in a million after a norm, where a GPU may add squares in another order: of 8,192 x 4,096 one code in
    five million differed on an H200. Of these two shapes none did."""
    from mixquant.kernels import nvfp4_fused

    torch.manual_seed(0)
    x, other, weight = (torch.randn(rows, shape[1], device=DEVICE).bfloat16() for rows in (shape[0], shape[0], 1))
    hardware = torch.cuda.get_device_capability() >= (10, 0)
    scaled = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    norm, swiglu = weight * scaled.bfloat16(), torch.nn.functional.silu(x) * other
    normed = nvfp4_fused.quantize_rms_norm(x, weight[0], 1e-6, 4.0, hardware)
    gated = nvfp4_fused.quantize_silu_mul(x, other, 4.0, hardware)
    assert max(differing(normed, norm, 4.0)) <= 1e-6
    assert differing(gated, swiglu, 4.0) == [0.0, 0.0]
    for found, chain in ((normed, norm), (gated, swiglu)):
        assert min(differing(found, chain, 3.7)) > 1e-2
    assert min(differing(normed, scaled.bfloat16(), 4.0)) > 1e-2  # control: without the norm's weight


def test_norms_and_swiglus_leave_their_output_to_layers_that_quantize_it() -> None:
    found = deferring.compared(DEVICE)
    assert found["quantized alone"] == [2, 14]
    assert found["logits"] < found["control"] / 3
    assert found["first decode rows"] < 2**-5  # a row alone may be summed in another order: a unit of BF16
    assert found["with grad"]
    assert found["steps"][0] < found["control"] / 3  # later ones may follow other tokens, where two are as likely
