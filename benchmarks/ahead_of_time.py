"""What our kernels become for each Blackwell GPU, without one: instructions, registers, spilled bytes.

    PYTHONPATH=src:. .venv/bin/python benchmarks/ahead_of_time.py      # after `make test` made its environment; no GPU

Triton's and NVRTC's own assemblers take the code for `sm_100a` (B200), `sm_103a` (B300), `sm_120a` (RTX 50) and
`sm_121a` (DGX Spark). Nothing that it computes is seen this way. A kernel that the pinned Triton does not compile for a
GPU has a row of the first Triton that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.kernels.triton_apart import NEXT_TRITON, TRITON, run_apart

from mixquant.kernels import nested_cuda, nvrtc

GPUS = (100, 103, 120, 121)
KERNELS = {
    "quantizer": "mixquant.nvfp4_quantizer",
    "rms_norm": "mixquant.nvfp4_rms_norm",
    "silu_mul": "mixquant.nvfp4_silu_mul",
    "fake_quantizer": "emulation.nvfp4",
    "product": "triton.dot_scaled.nvfp4",
}
"""As the tests and as `mixquant doctor` call them."""


def markdown() -> str:
    lines = ["| kernel | GPU | compiler | what the code holds | registers | spilled bytes |", "|---" * 6 + "|"]
    return "\n".join([*lines, *map(line, by_triton()), *map(line, by_nvrtc())])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def by_triton() -> Iterator[list[str]]:
    pinned, following = (run_apart("compile", triton) for triton in (TRITON, NEXT_TRITON))
    for key, name in KERNELS.items():
        for gpu in map(str, GPUS):
            yield row(name, gpu, pinned["triton"], pinned[key][gpu])
            if "error" in pinned[key][gpu]:
                yield row(name, gpu, following["triton"], following[key][gpu])


def row(name: str, gpu: str, triton: str, found: dict[str, Any]) -> list[str]:
    start = [name, f"sm_{gpu}a", f"Triton {triton}"]
    if "error" in found:
        return [*start, "nothing: it does not compile", "–", "–"]
    conversions = ["cvt.rn.satfinite.e2m1x2.f32"] * bool(found["conversions"])
    holds = " ".join(f"`{instruction}`" for instruction in (*found["products"], *conversions)) or "plain arithmetic"
    return [*start, holds, str(found["registers"]), str(found["spilled"])]


def by_nvrtc() -> Iterator[list[str]]:
    """The nested weights' kernels: the most of all its variants."""
    for gpu in GPUS:
        architecture = f"sm_{gpu}a"
        compiled = nvrtc.compile_source(
            nested_cuda.sources(architecture), nested_cuda.kernels(architecture), architecture
        )
        registers, spilled = (max(column) for column in zip(*compiled.resources().values(), strict=True))
        yield ["mixquant.nested", architecture, "NVRTC", "a binary, not read", f"≤ {registers}", str(spilled)]


if __name__ == "__main__":
    print(markdown())
