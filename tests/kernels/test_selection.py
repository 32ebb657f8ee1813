"""Which kernel runs where: the order, the reasons, and errors that name their remedies. Devices are simulated."""

from __future__ import annotations

import re

import pytest
import torch

from mixquant import devices, kernels
from mixquant.errors import InputError
from mixquant.kernels import KERNELS, Accepted, Rejected, cpu, cuda
from mixquant.kernels.layer import choose_kernels
from mixquant.policy import FORMATS, QUANTIZED, Policy

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _an_amx_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers must not depend on the CPU that runs the tests."""
    isa(monkeypatch, "amx")


def isa(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in (cpu, devices):
        monkeypatch.setattr(module, "cpu_isa", lambda: name)


def gpu(
    monkeypatch: pytest.MonkeyPatch,
    *capability: int,
    built: str = "13.0",
    triton: str | None = "3.8.0",
    fusion: str = "inductor",
) -> None:
    """A GPU, what this torch is built for, the version of Triton, and whether it finds a compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(cuda, "fusion_backend", lambda device_type: fusion)
    monkeypatch.setattr(cuda, "installed", lambda name: triton is not None)
    monkeypatch.setattr(cuda, "versions", lambda names: dict.fromkeys(names, triton))


def chosen(device: torch.device, dtype: torch.dtype = BF16) -> dict[str, str]:
    return {format: kernels.select(format, device, dtype).name for format in (*QUANTIZED, "bf16")}


EMULATED = {format: f"emulation.{format}" for format in QUANTIZED}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("amx", EMULATED | {"int8": "onednn.int8", "bf16": "onednn.bf16"}),
        ("avx512_bf16", EMULATED | {"int8": "onednn.int8", "bf16": "onednn.bf16"}),
        ("avx512_vnni", EMULATED | {"int8": "onednn.int8", "bf16": "torch.linear"}),
        ("none", EMULATED | {"bf16": "torch.linear"}),
    ],
)
def test_a_cpu_gets_what_its_instructions_can(
    name: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    isa(monkeypatch, name)
    assert chosen(CPU) == expected


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), EMULATED | {"bf16": "torch.linear"}),
        ((8, 9), EMULATED | {"fp8": "torch.scaled_mm.fp8", "bf16": "torch.linear"}),
        ((9, 0), EMULATED | {"fp8": "torch.scaled_mm.fp8", "bf16": "torch.linear"}),
        *(
            (
                blackwell,
                EMULATED | {"nvfp4": "torch.scaled_mm.nvfp4", "fp8": "torch.scaled_mm.fp8", "bf16": "torch.linear"},
            )
            for blackwell in [(10, 0), (10, 3), (12, 0), (12, 1)]
        ),
    ],
)
def test_a_gpu_gets_what_its_tensor_cores_can(
    capability: tuple[int, int], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, *capability)
    assert chosen(CUDA) == expected


@pytest.mark.parametrize(
    ("format", "dtype", "expected"),
    [
        ("bf16", torch.float32, "torch.linear"),
        ("int8", torch.float32, "onednn.int8"),
        ("nvfp4", torch.float64, "emulation.nvfp4"),
        ("nvfp4", torch.float16, "emulation.nvfp4"),
        ("int8", torch.float16, "onednn.int8"),
    ],
)
def test_the_dtype_decides_too(format: str, dtype: torch.dtype, expected: str) -> None:
    assert kernels.select(format, CPU, dtype).name == expected


@pytest.mark.parametrize("format", KERNELS)
def test_native_kernels_come_before_emulation(format: str) -> None:
    emulated = [kernel.emulated for kernel in KERNELS[format]]
    assert emulated == sorted(emulated)
    assert all(kernel.format == format for kernel in KERNELS[format])


@pytest.mark.parametrize(
    ("format", "reason"),
    [("nvfp4", "runs on CUDA, not on cpu"), ("fp8", "runs on CUDA, not on cpu")],
)
def test_cuda_kernels_say_why_they_do_not_run_on_a_cpu(format: str, reason: str) -> None:
    *native, emulated = kernels.candidates(format, CPU, BF16)
    assert {answer.verdict for answer in native} == {Rejected(reason)}
    assert emulated.verdict == Accepted()


@pytest.mark.parametrize(
    ("format", "capability", "dtype", "reason"),
    [
        ("nvfp4", (9, 0), BF16, "needs FP4 tensor cores (Blackwell, 10.0), not 9.0"),
        ("fp8", (8, 6), BF16, "needs a GPU with FP8 (8.9: Ada, Hopper, Blackwell), not 8.6"),
        ("fp8", (9, 0), torch.float16, "multiplies bfloat16 activations, not torch.float16"),
        ("int8", (9, 0), BF16, "runs on CPU, not on cuda"),
        ("bf16", (9, 0), BF16, "runs on CPU, not on cuda"),
    ],
)
def test_every_rejection_has_its_reason(
    format: str, capability: tuple[int, int], dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, *capability)
    assert kernels.candidates(format, CUDA, dtype)[0].verdict == Rejected(reason)


@pytest.mark.parametrize(
    ("capability", "built", "triton", "expected", "reason"),
    [
        ((10, 0), "12.8", "3.6.0", "torch.scaled_mm.nvfp4", None),
        ((10, 0), "13.0", None, "emulation.nvfp4", "quantizes activations with Triton: pip install triton"),
        ((12, 0), "12.6", None, "emulation.nvfp4", "built for CUDA 12.6: install one for CUDA 12.8 or newer"),
        ((12, 0), "12.6", "3.6.0", "triton.dot_scaled.nvfp4", "built for CUDA 12.6: install one for CUDA 12.8"),
        ((10, 3), "12.8", "3.7.1", "triton.dot_scaled.nvfp4", "built for CUDA 12.8: install one for CUDA 12.9"),
        ((12, 1), "12.8", "3.7.1", "emulation.nvfp4", "needs Triton 3.8 or newer on this GPU, not 3.7.1"),
        ((12, 1), "12.8", "3.8.0+local", "triton.dot_scaled.nvfp4", "install one for CUDA 12.9 or newer"),
        ((11, 0), "12.9", "3.9.0", "emulation.nvfp4", "no Triton is known to compile it for 11.0"),
        ((12, 0), "12.4", None, "emulation.nvfp4", "quantizes activations with Triton: pip install triton"),
    ],
)
def test_software_that_is_older_than_the_gpu_is_named_with_the_version_that_is_not(
    capability: tuple[int, int], built: str, triton: str | None, expected: str, reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    gpu(monkeypatch, *capability, built=built, triton=triton)
    assert kernels.select("nvfp4", CUDA, BF16).name == expected
    assert reason is None or reason in kernels.reasons(kernels.candidates("nvfp4", CUDA, BF16))


@pytest.mark.parametrize(
    ("format", "shape", "words"),
    [
        (
            "nvfp4",
            (24, 64),
            r"model.x of shape \[24, 64\]: this FP4 product needs N and K to be multiples of 16: add it",
        ),
        ("nvfp4", (32, 40), r"model.x of shape \[32, 40\]: this FP4 product needs N and K to be multiples of 16"),
        ("fp8", (24, 64), r"model.x of shape \[24, 64\]: FP8 tensor cores need"),
    ],
)
def test_a_shape_that_tensor_cores_cannot_take_is_refused_by_the_layer_s_name(
    format: str, shape: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, 10, 0)
    policy = Policy(prefill=format)
    with pytest.raises(InputError, match=words):
        choose_kernels(policy, shape, CUDA, BF16).check(policy, "model.x", shape)
    choose_kernels(policy, (32, 64), CUDA, BF16).check(policy, "model.x", (32, 64))


def test_a_shape_that_the_first_kernel_cannot_take_gets_the_next_native_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def name(shape: tuple[int, int], format: str = "nvfp4") -> str:
        return choose_kernels(Policy(prefill=format), shape, CUDA, BF16).prefill.name

    gpu(monkeypatch, 10, 0)
    assert name((32, 48)) == name((32, 48), "auto") == "triton.dot_scaled.nvfp4"
    assert name((32, 64)) == "torch.scaled_mm.nvfp4"
    assert name((32, 40)) == "triton.dot_scaled.nvfp4"  # which refuses it: emulation never stands in
    assert name((32, 40), "auto") == "torch.linear"
    gpu(monkeypatch, 12, 1, triton="3.7.1")
    assert name((32, 48)) == "torch.scaled_mm.nvfp4"


@pytest.mark.parametrize(("triton", "fusion"), [(None, "inductor"), ("3.8.0", "eager")])
def test_no_kernel_is_accepted_whose_quantizer_cannot_be_compiled(
    triton: str | None, fusion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, 10, 0, triton=triton, fusion=fusion)
    *native, emulated = kernels.candidates("nvfp4", CUDA, BF16)
    remedy = "install g++ and the headers of this Python" if triton else "pip install triton"
    for answer in native:
        assert isinstance(answer.verdict, Rejected)
        assert remedy in answer.verdict.reason
    assert emulated.verdict == Accepted()
    with pytest.raises(InputError, match=re.escape(remedy)):
        kernels.select("nvfp4", CUDA, BF16, native=True)


@pytest.mark.parametrize(
    ("driver", "built", "said"),
    [
        (12040, "13.0", "driver here is for CUDA 12.4 and this torch for 13.0: update the driver"),
        (13000, "13.2", "There is no CUDA device 0 here"),  # minor versions go together
        (0, "13.0", "There is no CUDA device 0 here"),  # no driver at all
        (12040, None, "There is no CUDA device 0 here"),
    ],
)
def test_a_driver_that_is_too_old_is_named(
    driver: int, built: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=said):
        devices.parse_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "driver" in said:  # a CPU in the place of a GPU would be a silent fallback
        with pytest.raises(InputError, match=said):
            devices.parse_device(None)
    else:
        assert devices.parse_device(None) == CPU
    assert devices.parse_device("cpu") == CPU


def test_float16_gets_no_emulation_that_overflows() -> None:
    """Products of two codes reach 448 * 448, more than float16 holds."""
    with pytest.raises(
        InputError, match=r"emulation.fp8: .*overflow float16: load the model in bfloat16.*choose another"
    ):
        kernels.select("fp8", CPU, torch.float16)


def test_native_refuses_emulation_and_names_both_remedies() -> None:
    with pytest.raises(InputError) as error:
        kernels.select("nvfp4", CPU, BF16, native=True)
    assert str(error.value) == (
        "No native kernel runs nvfp4 on cpu (torch.scaled_mm.nvfp4: runs on CUDA, not on cpu; "
        "triton.dot_scaled.nvfp4: runs on CUDA, not on cpu; emulation.nvfp4: emulated): "
        "choose another format, or allow emulation."
    )
    assert kernels.select("nvfp4", CPU, BF16).emulated
    assert not kernels.select("int8", CPU, BF16, native=True).emulated


@pytest.mark.parametrize(
    ("device", "expected"), [((9, 0), "fp8"), ((10, 0), "nvfp4"), ("amx", "int8"), ("avx512_vnni", "int8")]
)
def test_auto_takes_the_fastest_native_format(
    device: tuple[int, int] | str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(device, str):
        isa(monkeypatch, device)
        assert kernels.resolve_format("auto", CPU, BF16) == expected
    else:
        gpu(monkeypatch, *device)
        assert kernels.resolve_format("auto", CUDA, BF16) == expected


def test_auto_without_a_native_kernel_names_both_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    isa(monkeypatch, "none")
    with pytest.raises(InputError) as error:
        kernels.resolve_format("auto", CPU, BF16)
    assert "choose a format by name to emulate it (nvfp4, fp8, int8)" in str(error.value)
    assert "or run on a device that has one (see `mixquant doctor`)" in str(error.value)


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "auto"])
def test_a_format_by_name_is_taken_at_its_word(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    isa(monkeypatch, "none")
    assert kernels.resolve_format(format, CPU, BF16) == format


def test_int8_pays_for_large_layers_and_sooner_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    int8 = KERNELS["int8"][0]
    assert (int8.pays(1024, 1024), int8.pays(4096, 1024)) == (False, True)
    isa(monkeypatch, "avx512_vnni")
    assert (int8.pays(128, 128), int8.pays(1024, 1024)) == (False, True)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({"_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_vnni_supported"}, "amx"),
        ({"_is_avx512_bf16_supported", "_is_vnni_supported"}, "avx512_bf16"),
        ({"_is_vnni_supported"}, "avx512_vnni"),
        (set(), "none"),
    ],
)
def test_the_widest_instructions_are_named(features: set[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real cpu_isa, on a simulated CPU
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda supported=name in features: supported)
    assert cpu.cpu_isa() == expected
