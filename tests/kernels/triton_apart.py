"""What needs Triton, in a process of its own: python -m tests.kernels.triton_apart WHAT

Triton is no part of the tests' environment (`make test` puts it beside, in .venv/triton), and whether its interpreter
runs is decided when it is imported. Prints one JSON document. WHAT is `compile`, or what the interpreter shall do.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

TRITON, NEXT_TRITON = (Path(sys.prefix) / name for name in ("triton", "triton-3.8"))
"""Where `make test` puts the Triton that the pinned torch brings, and the first that compiles the product for 12.1."""

ARCHITECTURES = (90, 100, 103, 120, 121)


@functools.cache
def run_apart(what: str, triton: Path = TRITON) -> Any:
    """The document of a process that has Triton, with its interpreter unless it compiles."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(triton), *sys.path]),
        "TRITON_INTERPRET": str(int(what != "compile")),
    }
    command = [sys.executable, "-m", "tests.kernels.triton_apart", what]
    return json.loads(subprocess.run(command, check=True, env=os.environ | environment, capture_output=True).stdout)


def quantizer() -> dict[str, list[bool]]:
    """Whether the kernel's codes and scales are the format's, by input; and whether a control's are."""
    from mixquant.formats import nvfp4
    from mixquant.kernels.nvfp4_quantizer import quantize
    from tests.formats.inputs import INPUTS

    equal = {}
    for name in ("student_t3_bf16", "zero_blocks", "e2m1_ties", "scale_ties"):
        x = INPUTS[name]()[:6, :208]  # four tiles of scales, the last one not full
        for scale in (4.0, 3.7):
            reference = nvfp4.quantize(x, torch.tensor(scale))
            control = nvfp4.quantize(x, torch.tensor(scale), larger_scale).packed
            equal[f"{name} {scale}"] = compared(quantize(x, scale, hardware=False), reference, control)
    return equal


def fake_quantizer() -> dict[str, list[bool]]:
    """By input, scale and dtype: whether the kernel's values are the eager reference's, and a control's."""
    from mixquant.formats import nvfp4
    from mixquant.kernels.emulation import _fake_quant_blocks
    from mixquant.kernels.nvfp4_quantizer import fake_quantize
    from tests.formats.inputs import INPUTS, same_bits

    equal, eager = {}, _fake_quant_blocks.__wrapped__  # type: ignore[attr-defined]
    for name in ("student_t3_bf16", "zero_blocks", "e2m1_ties", "scale_ties"):
        for scale, dtype in ((4.0, torch.bfloat16), (3.7, torch.bfloat16), (3.7, torch.float32)):
            x, g = INPUTS[name]()[:6, :208].to(dtype), torch.tensor(scale)
            x[0, 5], x[1, 7] = torch.inf, -torch.inf
            found, blocks = fake_quantize(x, scale, 0.25), x.reshape(-1, 16)
            equal[f"{name} {scale} {dtype}"] = [
                same_bits(found, eager(blocks, rule(blocks.float(), g), g, torch.tensor(0.25)).view(x.shape))
                for rule in (nvfp4.block_scales, functools.partial(larger_scale, factor=1.125))
            ]
    x[2, 9] = torch.nan
    assert bool(fake_quantize(x, 4.0, 0.25)[2, 9].isnan())
    return equal


def compared(found: tuple[torch.Tensor, torch.Tensor], reference: Any, control: torch.Tensor) -> list[bool]:
    """Whether codes, swizzled scales, and a control's codes are those of a kernel."""
    from mixquant.formats import nvfp4

    codes, scales = found
    swizzled = nvfp4.swizzle(reference.scales).view(torch.uint8)
    return [
        torch.equal(codes, reference.packed),
        torch.equal(scales.view(torch.uint8), swizzled),
        torch.equal(codes, control),
    ]


def larger_scale(x: torch.Tensor, global_scale: torch.Tensor, factor: float = 2) -> torch.Tensor:
    from mixquant.formats import nvfp4

    return (nvfp4.block_scales(x, global_scale).float() * factor).clamp(max=448).to(torch.float8_e4m3fn)


def rms_norm() -> dict[str, list[bool]]:
    """By shape, whether codes and scales are those of Transformers' RMSNorm; control: not rounded before the weight.

    Squares of the inputs add up exactly, so that the order of a sum shows nothing.
    """
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    from mixquant.formats import nvfp4
    from mixquant.kernels.nvfp4_fused import quantize_rms_norm
    from tests.formats.inputs import gaussian

    equal = {}
    for rows, columns in ((24, 208), (4, 1040)):  # up to one program's columns, and beyond
        x = (gaussian(rows, columns) * 16).round().clamp(-64, 64).bfloat16() / 16
        norm = Qwen3RMSNorm(columns, eps=1e-6).bfloat16()
        norm.weight.data = gaussian(1, columns, seed=1)[0].bfloat16()
        values = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight.double()
        found = quantize_rms_norm(x, norm.weight.data, 1e-6, 4.0, hardware=False)
        control = nvfp4.quantize_activation(values.bfloat16()).packed
        equal[f"{rows} x {columns}"] = compared(found, nvfp4.quantize_activation(norm(x).detach()), control)
    return equal


def silu_mul() -> dict[str, list[bool]]:
    """By layout, whether codes and scales are those of Transformers' SwiGLU; control: SiLU not rounded.

    The gate takes every value of BF16 of a magnitude under 128; beyond, SiLU is the gate or 0.
    """
    from mixquant.formats import nvfp4
    from mixquant.kernels.nvfp4_fused import quantize_silu_mul
    from tests.formats.inputs import gaussian

    bits = torch.arange(0x4300, dtype=torch.int16)
    gate = torch.stack([bits, bits | -32768]).view(torch.bfloat16).view(16, -1)
    up = gaussian(*gate.shape).bfloat16()
    expected = nvfp4.quantize_activation(torch.nn.functional.silu(gate) * up)
    exact = (torch.nn.functional.silu(gate.double()) * up.double()).bfloat16()
    control = nvfp4.quantize_activation(exact).packed
    halves = torch.cat([gate, up], 1)
    layouts = {"two matrices": (gate, up), "halves of one": (halves[:, : gate.shape[1]], halves[:, gate.shape[1] :])}
    return {
        name: compared(quantize_silu_mul(*both, 4.0, hardware=False), expected, control)
        for name, both in layouts.items()
    }


def product() -> dict[str, list[float]]:
    """By shape: the error of the kernel's product, and of a control, as `accuracy.float32_excess` has it.

    In float32, because the interpreter cuts where hardware rounds to BF16.
    """
    from triton.language.semantic import TritonSemantic

    from mixquant.kernels import cuda
    from tests.kernels.accuracy import float32_excess

    TritonSemantic.dot_scaled = dot_scaled_by_the_book
    return {
        f"{m} x {n} x {k}{' + bias' if bias else ''}": float32_excess(cuda.NVFP4DotScaled, m, n, k, bias)
        for m, n, k, bias in ((1, 16, 16, False), (9, 48, 96, True), (130, 144, 272, True), (128, 128, 512, False))
    }


def dot_scaled_by_the_book(
    self: Any, x: Any, x_scale: Any, x_format: str, weight: Any, weight_scale: Any, weight_format: str, total: Any,
    *_: object,
) -> Any:  # fmt: skip
    """What Triton documents of `tl.dot_scaled` for E2M1 codes packed along K; its interpreter has none of its own."""
    from triton.runtime.interpreter import TensorHandle

    from mixquant.formats import nvfp4

    assert x_format == weight_format == "e2m1"
    values = []
    for codes, scale in ((x.handle.data, x_scale), (weight.handle.data.T, weight_scale)):
        block = torch.tensor(scale.handle.data).view(torch.float8_e4m3fn).double()
        values.append(nvfp4.unpack(torch.tensor(codes)).double() * block.repeat_interleave(16, 1))
    product = values[0] @ values[1].T + torch.tensor(total.handle.data).double()
    return self.tensor(TensorHandle(product.float().numpy(), total.handle.dtype), total.type)


def deferred() -> dict[str, Any]:
    """`tests.model.deferring` in the interpreter."""
    from tests.model.deferring import compared

    return compared(torch.device("cpu"))


class Kernel(NamedTuple):
    """What a kernel is compiled from. aligned: arguments that are multiples of 16, as every caller's are."""

    function: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int] | None = None


def kernels(hardware: bool) -> dict[str, Kernel]:
    """All Triton kernels; hardware: with Blackwell's rounding."""
    from mixquant.kernels import nvfp4_fused, nvfp4_product, nvfp4_quantizer

    written = {"codes": "*u8", "scales": "*u8", "global_scale": "fp32"}
    shape = {"rows": "i32", "columns": "i32", "tiles": "i32"}
    constants = {"WIDTH": nvfp4_quantizer.WIDTH, "HARDWARE": hardware}
    operands = ("x", "x_scales", "x_decode", "weight", "weight_scales", "weight_decode", "bias", "out")
    types = ("*u8", "*fp8e4nv", "*fp32", "*u8", "*fp8e4nv", "*fp32", "*bf16", "*bf16")
    sizes = dict.fromkeys(("m", "n", "k", "tiles"), "i32")
    tile = {"ROWS": nvfp4_product.ROWS, "COLUMNS": nvfp4_product.COLUMNS, "DEPTH": nvfp4_product.DEPTH}
    return {
        "quantizer": Kernel(
            nvfp4_quantizer._quantize,
            {"x": "*bf16"} | written | shape | {"stride": "i32"},
            constants,
            ("x", "codes", "scales", "columns", "stride"),
        ),
        "fake_quantizer": Kernel(
            nvfp4_quantizer._fake_quantize,
            {"x": "*bf16", "out": "*bf16", "global_scale": "fp32", "step": "fp32", "count": "i32"},
            {"WIDTH": nvfp4_quantizer.WIDTH},
            ("x", "out", "count"),
        ),
        "rms_norm": Kernel(
            nvfp4_fused._rms_norm,
            {"x": "*bf16", "weight": "*bf16"} | written | {"epsilon": "fp32"} | shape | {"stride": "i32"},
            constants,
            ("x", "weight", "codes", "scales", "columns", "stride"),
        ),
        "silu_mul": Kernel(
            nvfp4_fused._silu_mul,
            {"gate": "*bf16", "up": "*bf16"} | written | shape | {"gate_stride": "i32", "up_stride": "i32"},
            constants,
            ("gate", "up", "codes", "scales", "columns", "gate_stride", "up_stride"),
        ),
        "product": Kernel(
            nvfp4_product._product,
            dict(zip(operands, types, strict=True)) | sizes,
            {"BIAS": True} | tile,
            (*operands, "n", "k"),
            nvfp4_product.OPTIONS,
        ),
    }


def compile() -> dict[str, Any]:
    """By kernel and architecture: what its PTX holds, and what ptxas says of it; or that Triton compiles nothing."""
    import triton

    found: dict[str, Any] = {"triton": triton.__version__}
    for capability in ARCHITECTURES:
        for name, kernel in kernels(hardware=capability >= 100).items():
            found.setdefault(name, {})[str(capability)] = assembled(kernel, capability)
    return found


def assembled(kernel: Kernel, capability: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = list(kernel.signature)
    attributes = {(arguments.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned}
    signature = kernel.signature | dict.fromkeys(kernel.constants, "constexpr")
    source = ASTSource(kernel.function, signature, kernel.constants, attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=kernel.options)
    except RuntimeError as error:
        return {"error": str(error)}
    ptx = compiled.asm["ptx"]
    registers, spilled = resources(ptx, capability)
    return {
        "target": re.findall(r"\.target (\w+)", ptx)[0],
        "conversions": ptx.count("cvt.rn.satfinite.e2m1x2.f32"),
        "products": sorted(set(re.findall(r"tcgen05\.mma\S*|(?:wg)?mma\S*\.sync\S*", ptx))),
        "registers": registers,
        "spilled": spilled,
        "shared": compiled.metadata.shared,
    }


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers of a thread and bytes spilled, by the ptxas that Triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    from mixquant.kernels.nvrtc import Compiled

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(capability).path, "-v", f"--gpu-name=sm_{capability}a", file, "-o", file.with_suffix(".o")]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (found,) = Compiled(b"", {}, log).resources().values()
    return found


WHAT: dict[str, Callable[[], Any]] = {
    each.__name__: each for each in (compile, quantizer, fake_quantizer, rms_norm, silu_mul, product, deferred)
}

if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]]()))
