"""Nested kernels, and which layers get them. The kernel that a device without one would need is simulated."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mixquant import kernels
from mixquant.errors import InputError
from mixquant.formats import fp8, nested, quantizer
from mixquant.kernels import layer
from mixquant.kernels.base import Accepted, LinearKernel, PlainKernel, QuantizedKernel
from mixquant.kernels.emulation import EmulatedFP8, EmulatedInt8, EmulatedNVFP4, EmulatedPlane
from mixquant.kernels.layer import Built, LayerKernels, build, choose_kernels
from mixquant.kernels.nested import EmulatedNested
from mixquant.kernels.nested_cuda import NestedCUDA
from mixquant.policy import Policy
from tests.formats.inputs import gaussian, same_bits
from tests.kernels.native import Native, Slow

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16
N, K = 48, 128
PLAIN = kernels.select("bf16", CPU, BF16)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "NESTED", (Native, EmulatedNested))


def weights(seed: int = 1) -> Tensor:
    """Gaussian, with escapes."""
    weight = gaussian(N, K, seed=seed) * 0.02
    weight[3, 4], weight[40, 0] = 1.7e-8, -3.1e-8
    return weight.to(BF16)


def activations(rows: int = 9) -> Tensor:
    return gaussian(rows, K, seed=2).to(BF16)


def make(weight: Tensor) -> Callable[[type[LinearKernel]], LinearKernel]:
    def lay_out(kernel: type[LinearKernel]) -> LinearKernel:
        if issubclass(kernel, QuantizedKernel):
            return kernel.from_weight(weight, quantizer(kernel.format))
        assert issubclass(kernel, PlainKernel)
        return kernel(weight)

    return lay_out


def built(weight: Tensor, **policy: str) -> Built[LinearKernel]:
    """Under a policy whose storage is `auto`, where none is said."""
    return build(Policy.parse({"storage": "auto"} | policy), weight, make(weight))


def chosen(
    device: torch.device = CPU, shape: tuple[int, int] = (N, K), dtype: torch.dtype = BF16, **policy: str
) -> LayerKernels:
    return choose_kernels(Policy.parse({"storage": "auto"} | policy), shape, device, dtype)


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_the_emulated_kernel_is_the_plain_one_bit_for_bit() -> None:
    weight, x, bias = weights(), activations(), gaussian(1, N).flatten().to(BF16)
    split = nested.split(weight)
    assert split.escapes.columns.numel()  # else the test would not see them
    kernel = EmulatedNested(split)
    assert same_bits(kernel.dense(), weight)
    assert torch.equal(kernel(x, bias), PLAIN(weight)(x, bias))
    other = replace(split, nibbles=split.nibbles ^ 1)
    assert not torch.equal(EmulatedNested(other)(x, bias), PLAIN(weight)(x, bias))


def test_the_emulated_plane_is_emulated_fp8_bit_for_bit() -> None:
    plane, x = nested.split(weights()).fp8, activations()
    kernel = EmulatedPlane(plane, BF16)
    assert kernel.weight.data_ptr() == plane.codes.data_ptr()
    assert torch.equal(kernel(x, None), EmulatedFP8(plane, BF16)(x, None))
    assert not torch.equal(kernel(x, None), EmulatedFP8(fp8.quantize(weights()), BF16)(x, None))


def test_both_phases_share_the_plane() -> None:
    prefill, decode, separate = built(weights(), prefill="fp8", storage="nested")
    assert isinstance(decode, EmulatedNested)
    assert isinstance(prefill, EmulatedPlane)
    assert prefill.weight.data_ptr() == decode.plane.data_ptr()
    assert prefill.weight_scales.data_ptr() == decode.fp8.scales.data_ptr()
    assert separate is None


def test_nvfp4_stands_beside_a_nested_weight() -> None:
    weight = weights()
    prefill, decode, _ = built(weight, prefill="nvfp4", storage="nested")
    assert isinstance(decode, EmulatedNested)
    expected = EmulatedNVFP4.from_weight(weight, quantizer("nvfp4"))
    assert isinstance(prefill, EmulatedNVFP4)
    assert torch.equal(prefill.weight, expected.weight)


def test_uniform_fp8_keeps_the_plane_alone() -> None:
    """The numbers that prompts are multiplied by in the phase arm, which separate copies are not."""
    weight, x = weights(), activations()
    prefill, decode, _ = built(weight, prefill="fp8", decode="fp8", storage="nested")
    assert prefill is decode
    assert sum(tensor.nbytes for tensor in prefill.tensors()) == N * K + 4 * N
    assert torch.equal(prefill(x, None), built(weight, prefill="fp8", storage="nested").prefill(x, None))
    assert not torch.equal(prefill(x, None), built(weight, prefill="fp8", storage="separate").prefill(x, None))


@pytest.mark.parametrize(
    ("policy", "bits"),
    [
        ({"prefill": "fp8", "storage": "nested"}, 12),
        ({"prefill": "fp8", "decode": "fp8", "storage": "nested"}, 8),
        ({"prefill": "nvfp4", "storage": "nested"}, 12 + 16),  # emulation keeps exact copies in the model's dtype
        ({"prefill": "fp8", "storage": "separate"}, 16 + 16),
    ],
)
def test_bits_a_weight(policy: dict[str, str], bits: float) -> None:
    """Large layers: what a row takes beside its weights is small."""
    n, k = 512, 4096
    decode, prefill = chosen(shape=(n, k), **policy).nbytes(n, k, BF16)
    assert 8 * (decode + prefill) / (n * k) == pytest.approx(bits, rel=0.002)


def test_bytes_are_known_beforehand_but_for_escapes() -> None:
    split = nested.split(weights())
    held = sum(tensor.nbytes for tensor in EmulatedNested(split).tensors())
    escapes = split.escapes.columns.nbytes + split.escapes.differences.nbytes
    assert escapes > 0
    assert held == EmulatedNested.nbytes(N, K, BF16) + escapes == split.nbytes


# --- who nests ------------------------------------------------------------------------------------------------------


def test_auto_nests_where_a_native_kernel_runs(native: None) -> None:
    assert chosen(prefill="fp8") == LayerKernels(EmulatedPlane, Native, plane=True)
    assert chosen(prefill="nvfp4") == LayerKernels(EmulatedNVFP4, Native)
    assert chosen(prefill="fp8", decode="fp8") == LayerKernels(EmulatedPlane, EmulatedPlane, plane=True)
    assert chosen(prefill="bf16", decode="fp8") == LayerKernels(PLAIN, EmulatedPlane, plane=True)


@pytest.mark.parametrize("policy", [{"prefill": "bf16"}, {"prefill": "nvfp4", "decode": "nvfp4"}])
def test_auto_leaves_what_has_no_fp8_and_no_bf16_beside_it(native: None, policy: dict[str, str]) -> None:
    assert not chosen(**policy).nested
    assert not chosen(**policy).plane


def test_int8_does_not_nest(native: None) -> None:
    assert chosen(prefill="int8") == LayerKernels(kernels.select("int8", CPU, BF16), PLAIN)


def test_auto_without_a_kernel_that_pays_is_separate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "NESTED", (Slow, EmulatedNested))
    assert chosen(prefill="fp8") == chosen(prefill="fp8", storage="separate")
    assert chosen(prefill="fp8", storage="nested").decode is Slow


@pytest.mark.parametrize(("capability", "pays"), [((8, 9), False), ((9, 0), True), ((10, 0), False), ((12, 0), False)])
def test_nesting_pays_where_it_has_been_measured(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], pays: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert NestedCUDA.default_on(CUDA) is pays


def test_auto_without_a_native_kernel_is_separate() -> None:
    assert chosen(prefill="fp8") == LayerKernels(EmulatedFP8, PLAIN) == chosen(prefill="fp8", storage="separate")
    assert chosen(prefill="fp8", storage="nested") == LayerKernels(EmulatedPlane, EmulatedNested, plane=True)


def test_a_folders_codes_stand_beside_a_nested_weight(native: None) -> None:
    """They are other numbers than the plane."""
    for prefill, kernel in (("fp8", EmulatedFP8), ("nvfp4", EmulatedNVFP4)):
        assert choose_kernels(
            Policy(prefill=prefill, storage="auto"), (N, K), CPU, BF16, from_folder=True
        ) == LayerKernels(kernel, Native)
    uniform = Policy(prefill="fp8", decode="fp8", storage="auto")
    assert choose_kernels(uniform, (N, K), CPU, BF16, from_folder=True) == LayerKernels(EmulatedFP8, EmulatedFP8)


@pytest.mark.parametrize("shape", [(N, 96), (N + 8, K)])
def test_a_shape_that_does_not_nest(native: None, shape: tuple[int, int]) -> None:
    """`auto` says so and keeps two copies; asked for, it is an error that names the layer."""
    reason = "nested weights need N to be a multiple of 16 and K of 64"
    assert chosen(shape=shape, prefill="fp8") == LayerKernels(EmulatedFP8, PLAIN, separate=reason)
    insists = Policy(prefill="fp8", storage="nested")
    with pytest.raises(InputError, match=r"mlp\.up of shape .*multiple of 16.*: use storage=separate, or add"):
        choose_kernels(insists, shape, CPU, BF16).check(insists, "mlp.up", shape)


def test_a_weight_with_too_many_escapes(native: None) -> None:
    weight = weights()
    weight[20, :64] = 1.7e-8
    with pytest.raises(InputError, match=r"6\d of 2048 weights in 16 rows are too small .*: use storage=separate, or"):
        built(weight, prefill="fp8", storage="nested")
    prefill, decode, separate = built(weight, prefill="fp8")
    assert (type(prefill), type(decode)) == (EmulatedFP8, PLAIN)
    assert separate is not None
    assert re.match(r"6\d of 2048 weights in 16 rows are too small beside [^:]*$", separate)
    assert built(weight, prefill="fp8", decode="fp8").separate == separate  # as in the phase arm: like with like


@pytest.mark.parametrize("storage", ["auto", "nested"])
def test_a_broken_weight(native: None, storage: str) -> None:
    weight = weights()
    weight[2, 3] = torch.nan
    with pytest.raises(InputError, match="1 NaN or Inf"):
        built(weight, prefill="fp8", storage=storage)


def test_only_bfloat16_nests(native: None) -> None:
    assert chosen(dtype=torch.float32, prefill="fp8").prefill is EmulatedFP8
    with pytest.raises(InputError, match=r"only bfloat16 weights nest, not torch.float32.*: use storage=separate"):
        chosen(dtype=torch.float32, prefill="fp8", storage="nested")


def test_a_gpu_without_fp8_is_told_which_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(
        InputError,
        match=r"No kernel reads nested weights on cuda .*8.9: Ada, Hopper, Blackwell.*: use storage=separate",
    ):
        chosen(CUDA, prefill="fp8", storage="nested")
    assert not chosen(CUDA, prefill="fp8").plane
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert EmulatedNested.check(CUDA, BF16) == Accepted()


def test_native_refuses_emulation() -> None:
    policy = Policy(prefill="bf16", native=True)
    assert not choose_kernels(policy, (N, K), CPU, BF16).nested
    with pytest.raises(InputError, match=r"No kernel reads nested weights on cpu \(.*emulation.nested: emulated\)"):
        layer.nested_kernel(Policy(prefill="fp8", storage="nested", native=True), CPU, BF16)


def test_asked_for_where_auto_is_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedInt8, "emulated", False)
    table = kernels.KERNELS | {"int8": (EmulatedInt8,)}  # type: ignore[operator]
    with pytest.raises(InputError, match="serves FP8 and NVFP4 prompts, and auto is int8 here: use storage=separate"):
        choose_kernels(Policy(storage="nested"), (N, K), CPU, BF16, table)


def test_native_nested_kernels_come_before_emulation() -> None:
    emulated = [kernel.emulated for kernel in kernels.NESTED]
    assert emulated == sorted(emulated)
    assert all(kernel.format == "bf16" for kernel in kernels.NESTED)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_product_is_one_graph_of_the_same_bits() -> None:
    x = activations()
    kernel, other = EmulatedNested(nested.split(weights())), EmulatedNested(nested.split(weights(seed=3)))
    for bias in (None, gaussian(1, N, seed=4)[0].to(BF16)):
        compiled = torch.compile(lambda kernel, x, b=bias: kernel(x, b), backend="eager", fullgraph=True)
        assert same_bits(compiled(kernel, x), kernel(x, bias))
        assert not same_bits(compiled(other, x), kernel(x, bias))
