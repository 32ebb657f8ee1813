"""What needs Triton, in a process of its own: python -m tests.kernels.triton_apart interpret|compile

Triton is no part of the tests' environment (`make test` puts it beside, in .venv/triton), and whether its interpreter
runs is decided when it is imported. Prints one JSON document.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

TRITON = Path(sys.prefix) / "triton"
"""Where `make test` puts Triton."""

SIGNATURE = {
    "x": "*bf16", "codes": "*u8", "scales": "*u8", "global_scale": "fp32", "rows": "i32", "columns": "i32",
    "tiles": "i32", "stride": "i32", "WIDTH": "constexpr", "HARDWARE": "constexpr",
}  # fmt: skip


def run_apart(what: str) -> Any:
    """The document of a process that has Triton, with its interpreter or without."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(TRITON), *sys.path]),
        "TRITON_INTERPRET": str(int(what == "interpret")),
    }
    command = [sys.executable, "-m", "tests.kernels.triton_apart", what]
    return json.loads(subprocess.run(command, check=True, env=os.environ | environment, capture_output=True).stdout)


def interpret() -> dict[str, list[bool]]:
    """Whether the kernel's codes and scales are the format's, by input; and whether a control's are."""
    from mixquant.formats import nvfp4
    from mixquant.kernels.nvfp4_quantizer import quantize
    from tests.formats.inputs import INPUTS

    equal = {}
    for name in ("student_t3_bf16", "zero_blocks", "e2m1_ties", "scale_ties"):
        x = INPUTS[name]()[:6, :208]  # four tiles of scales, the last one not full
        for scale in (4.0, 3.7):
            reference = nvfp4.quantize(x, torch.tensor(scale))
            codes, scales = quantize(x, scale, hardware=False)
            swizzled = nvfp4.swizzle(reference.scales)
            equal[f"{name} {scale}"] = [
                torch.equal(codes, reference.packed),
                torch.equal(scales.view(torch.uint8), swizzled.view(torch.uint8)),
                torch.equal(codes, nvfp4.quantize(x, torch.tensor(scale), twice_the_scale).packed),
            ]
    return equal


def twice_the_scale(x: torch.Tensor, global_scale: torch.Tensor) -> torch.Tensor:
    from mixquant.formats import nvfp4

    return (nvfp4.block_scales(x, global_scale).float() * 2).clamp(max=448).to(torch.float8_e4m3fn)


def compile() -> dict[str, dict[str, Any]]:
    """By architecture and branch: the target in the PTX, how many conversions to E2M1 it holds, and ptxas's binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from mixquant.kernels import nvfp4_quantizer

    found = {}
    for capability, hardware in ((90, False), (100, True), (103, True), (120, True), (121, True)):
        constants = {"WIDTH": nvfp4_quantizer.WIDTH, "HARDWARE": hardware}
        source = ASTSource(nvfp4_quantizer._quantize, SIGNATURE, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        ptx = compiled.asm["ptx"]
        found[str(capability)] = {
            "target": re.findall(r"\.target (\w+)", ptx)[0],
            "conversions": ptx.count("cvt.rn.satfinite.e2m1x2.f32"),
            "binary": len(compiled.asm["cubin"]),
        }
    return found


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile}[sys.argv[1]]()))
