"""What quantizing NVFP4 activations costs: one Triton kernel against the eager chain, alone and after what precedes it.

    python benchmarks/nvfp4_activations.py [--json FILE]      # one CUDA GPU; under a minute

Inputs are those of a Qwen3-8B layer in BF16. `eager` is the reference in `formats`, with Transformers' norm and SwiGLU,
operation by operation, as PyTorch runs them; `one kernel` is ours, which writes packed codes and scales in tiles. The
rows `emulated` make values instead of codes, for the emulation of NVFP4. GPUs before Blackwell round to E2M1 by plain
arithmetic. Beside each: reading and writing every byte once at the rate at which this GPU copies, and, for scale, a
BF16 product of the same input with a weight [4096, K]. Medians of 20, in microseconds. With TRITON_INTERPRET=1 on a CPU
it is a trial of the script, on a few rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mixquant.devices import device_name
from mixquant.formats import nvfp4
from mixquant.kernels import emulation, nvfp4_fused, nvfp4_quantizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, HIDDEN, INNER, ROUNDS = ((512, 2048, 8192), 4096, 12288, 20) if DEVICE.type == "cuda" else ((2,), 64, 192, 1)
WARM_UP = 3
BF16, CODES = 2.0, 4.5 / 8
"""Bytes of a value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rate = copy_rate()
    hardware = DEVICE.type == "cuda" and nvfp4_quantizer.rounds_in_hardware(DEVICE)
    facts = {"device": device_name(DEVICE), "torch": torch.__version__, "copied bytes a second": rate}
    rounding = "by its own instruction" if hardware else "by plain arithmetic"
    print(f"{facts['device']}, torch {torch.__version__}, copies {rate / 1e12:.2f} TB/s, rounds to E2M1 {rounding}\n")
    print("| rows x K | activations | eager | one kernel | gain | floor | BF16 product | codes that differ |")
    print("|---" * 8 + "|")
    table = []
    for rows in ROWS:
        for case in cases(rows, hardware):
            table.append(measured(rows, *case, rate))
            if args.json:
                args.json.write_text(json.dumps(facts | {"hardware rounding": hardware, "rows": table}, indent=1))


Work = Callable[[], Any]


def cases(rows: int, hardware: bool) -> Iterator[tuple[str, int, float, Work, Work]]:
    """Name, K, bytes of a value that are read and written, the eager chain, and one kernel."""
    x, gate, up = (random(rows, k) for k in (HIDDEN, INNER, INNER))
    weight, g = random(1, HIDDEN)[0], nvfp4.ACTIVATION_GLOBAL_SCALE
    yield "alone", HIDDEN, BF16 + CODES, lambda: chain(x), lambda: nvfp4_quantizer.quantize(x, g, hardware)
    yield (
        "after RMSNorm", HIDDEN, BF16 + CODES, lambda: chain(norm(x, weight)),
        lambda: nvfp4_fused.quantize_rms_norm(x, weight, 1e-6, g, hardware),
    )  # fmt: skip
    yield (
        "after SwiGLU", INNER, 2 * BF16 + CODES, lambda: chain(torch.nn.functional.silu(gate) * up),
        lambda: nvfp4_fused.quantize_silu_mul(gate, up, g, hardware),
    )  # fmt: skip
    yield "emulated", HIDDEN, 2 * BF16, lambda: fake(x), lambda: nvfp4_quantizer.fake_quantize(x, g, 1 / g)


def measured(
    rows: int, name: str, k: int, bytes_a_value: float, eager: Work, kernel: Work, rate: float
) -> dict[str, Any]:
    """One line of the table, printed."""
    weight, x = random(HIDDEN, k), random(rows, k)
    times = {"eager": time(eager), "one kernel": time(kernel)}
    times["floor"] = rows * k * bytes_a_value / rate * 1e6
    times["product"] = time(lambda: torch.nn.functional.linear(x, weight))
    one, other = (found[0] if isinstance(found, tuple) else found for found in (eager(), kernel()))
    differ = float((one != other).double().mean())
    print(
        f"| {rows} x {k} | {name} | {times['eager']:.0f} | {times['one kernel']:.0f} | "
        f"{times['eager'] / times['one kernel']:.1f}x | {times['floor']:.0f} | {times['product']:.0f} | {differ:.1e} |",
        flush=True,
    )
    return {"rows": rows, "k": k, "activations": name, "us": times, "differ": differ}


def chain(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales in tiles, by the reference."""
    values, g = x.to(torch.float32), torch.tensor(nvfp4.ACTIVATION_GLOBAL_SCALE, device=x.device)
    quantized = nvfp4.encode(values, g, nvfp4.block_scales(values, g))
    return quantized.packed, nvfp4.swizzle(quantized.scales)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Transformers' RMSNorm."""
    values = x.to(torch.float32)
    return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def fake(x: Tensor) -> Tensor:
    """The values that the codes stand for, by the reference."""
    blocks, g = x.reshape(-1, nvfp4.BLOCK), torch.tensor(nvfp4.ACTIVATION_GLOBAL_SCALE, device=x.device)
    scales = emulation._block_scales.__wrapped__(blocks, g)  # type: ignore[attr-defined]
    values: Tensor = emulation._fake_quant_blocks.__wrapped__(blocks, scales, g, 1 / g)  # type: ignore[attr-defined]
    return values.view(x.shape)


def random(rows: int, k: int) -> Tensor:
    return torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)


def copy_rate() -> float:
    """Bytes a second of a large copy, read and written."""
    x = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    out = torch.empty_like(x)
    return 2 * x.nbytes / time(lambda: out.copy_(x)) * 1e6


def time(work: Work) -> float:
    """Median microseconds."""
    clock = on_gpu if DEVICE.type == "cuda" else on_cpu
    return statistics.median([clock(work) for _ in range(WARM_UP + ROUNDS)][WARM_UP:])


def on_gpu(work: Work) -> float:
    """The GPU sleeps first, so that what is launched has been when it begins."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(500_000)
    start.record()
    work()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e3


def on_cpu(work: Work) -> float:
    begin = perf_counter()
    work()
    return 1e6 * (perf_counter() - begin)


if __name__ == "__main__":
    main()
