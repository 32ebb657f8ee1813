"""What has been proven of each kernel on each hardware, and by what: the one place in the project that says so.

    ran        the kernel ran on such hardware, and its results or its times are kept or tested
    compiled   its code for such hardware was assembled ahead of time, without it: nothing that it computes was seen
    emulated   on a CPU, its arithmetic or its operands were held against the reference, without the hardware
    never      none of these

`mixquant doctor` prints this table, docs/kernels.md holds it word for word, and what the README says is checked against
it. A kernel that has no row here fails a test; so does a proof that names a file which is not there. A hardware that a
row leaves out is one that the kernel is not for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch

How = Literal["ran", "compiled", "emulated", "never"]

HARDWARE: Mapping[str, tuple[int, int] | None] = {
    "CPU": None,
    "Ada": (8, 9),
    "Hopper": (9, 0),
    "B200": (10, 0),
    "B300": (10, 3),
    "RTX 50": (12, 0),
    "DGX Spark": (12, 1),
}
"""Compute capability of each hardware that has a column; the last four are Blackwell."""

BLACKWELL = ("B200", "B300", "RTX 50", "DGX Spark")


@dataclass(frozen=True)
class Proof:
    """How something was proven, and the file of the repository that shows it."""

    how: How
    by: str | None = None


NEVER = Proof("never")

_SCALED_MM = Proof("emulated", "tests/kernels/test_scaled_mm.py")
_VLLM = Proof("emulated", "tests/integrations/vllm/test_kernels.py")
_REFERENCE = Proof("ran", "tests/kernels/test_kernels.py")
_CUDA_TESTS = Proof("ran", "tests/kernels/test_cuda.py")
_NVRTC = Proof("compiled", "tests/kernels/test_nested_cuda.py")
_PRODUCT = "tests/kernels/test_nvfp4_product.py"


def _on(names: Iterable[str], proof: Proof) -> dict[str, Proof]:
    return dict.fromkeys(names, proof)


_QUANTIZER = {
    "CPU": Proof("emulated", "tests/kernels/test_nvfp4_quantizer.py"),
    "Hopper": Proof("ran", "benchmarks/results/nvfp4-activations-h200.md"),
    **_on(BLACKWELL, Proof("compiled", "tests/kernels/test_nvfp4_quantizer.py")),
}

PROOFS: Mapping[str, Mapping[str, Proof]] = {
    "torch.scaled_mm.nvfp4": {"CPU": _SCALED_MM, **_on(BLACKWELL, NEVER)},
    "vllm.nvfp4": {"CPU": _VLLM, **_on(BLACKWELL, NEVER)},
    "triton.dot_scaled.nvfp4": {
        "CPU": Proof("emulated", _PRODUCT),
        **_on(BLACKWELL, Proof("compiled", _PRODUCT)),
    },
    "mixquant.nvfp4_quantizer": _QUANTIZER,
    "mixquant.nvfp4_rms_norm": _QUANTIZER,
    "mixquant.nvfp4_silu_mul": _QUANTIZER,
    "torch.scaled_mm.fp8": {"CPU": _SCALED_MM, "Hopper": _CUDA_TESTS, **_on(("Ada", *BLACKWELL), NEVER)},
    "vllm.cutlass_fp8": {
        "CPU": _VLLM,
        "Hopper": Proof("ran", "benchmarks/results/vllm-h200.md"),
        **_on(("Ada", *BLACKWELL), NEVER),
    },
    "mixquant.nested": {
        "CPU": Proof("emulated", "tests/kernels/test_nested_emulated.py"),
        "Hopper": Proof("ran", "benchmarks/results/nested-h200.md"),
        **_on(("Ada", *BLACKWELL), _NVRTC),
    },
    "mixquant.nested_split": {
        "CPU": Proof("emulated", "tests/kernels/test_nested_split.py"),
        "Hopper": _CUDA_TESTS,
        **_on(("Ada", *BLACKWELL), _NVRTC),
    },
    "onednn.int8": {"CPU": Proof("ran", "benchmarks/results/cpu-xeon-amx.txt")},
    "onednn.bf16": {"CPU": Proof("ran", "benchmarks/results/cpu-xeon-amx.txt")},
    "torch.linear": {
        "CPU": _REFERENCE,
        "Hopper": Proof("ran", "benchmarks/results/nested-h200.md"),
        **_on(("Ada", *BLACKWELL), NEVER),
    },
    "emulation.nvfp4": {
        "CPU": _REFERENCE,
        "Hopper": Proof("ran", "benchmarks/results/emulation-h200.md"),
        "Ada": NEVER,
        **_on(BLACKWELL, Proof("compiled", "tests/kernels/test_nvfp4_quantizer.py")),
    },
    "emulation.fp8": {
        "CPU": _REFERENCE,
        "Hopper": Proof("ran", "benchmarks/results/blackwell-fp8-h200.md"),
        **_on(("Ada", *BLACKWELL), NEVER),
    },
    "emulation.int8": {"CPU": _REFERENCE, "Hopper": _CUDA_TESTS, **_on(("Ada", *BLACKWELL), NEVER)},
    "emulation.nested": {
        "CPU": Proof("ran", "tests/kernels/test_nested.py"),
        **_on(("Ada", "Hopper", *BLACKWELL), NEVER),
    },
}
"""By kernel, as `LinearKernel.name` has it, and hardware."""


def hardware(device: torch.device) -> str | None:
    """The column of a device, None where it has none."""
    found = None if device.type == "cpu" else torch.cuda.get_device_capability(device)
    return next((name for name, capability in HARDWARE.items() if capability == found), None)


def proven(kernel: str, device: torch.device) -> Proof:
    """How a kernel was proven on hardware such as `device`."""
    return PROOFS[kernel].get(hardware(device) or "", NEVER)


def sentence(kernel: str) -> str:
    """A row in words: "ran: Hopper; compiled: Ada, B200"."""
    by = PROOFS[kernel]
    found = {how: [name for name in HARDWARE if name in by and by[name].how == how] for how in get_args(How)}
    return "; ".join(f"{how}: {', '.join(names)}" for how, names in found.items() if names)


def markdown() -> str:
    """The table as documents hold it; a dash: not for this hardware."""
    rows = [[kernel, *(by[name].how if name in by else "–" for name in HARDWARE)] for kernel, by in PROOFS.items()]
    lines = [f"| {' | '.join(row)} |" for row in (["kernel", *HARDWARE], *rows)]
    return "\n".join([lines[0], "|---" * (len(HARDWARE) + 1) + "|", *lines[1:]])
