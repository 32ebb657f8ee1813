"""What it costs to hold no second copy: BF16 weights cast to FP8 in every prefill step, against resident FP8 ones.

    python benchmarks/cast_per_step.py       # one GPU with FP8: 20 s, most of it compiling

The linear layers of one Qwen3-8B decoder layer, milliseconds, medians of 7. Scales of the weights are kept in both; the
cast and the quantization of activations are torch.compile's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.nested_linear import SHAPES, milliseconds, random_weight
from mixquant.formats import fp8

ROUNDS = 7


@torch.compile(dynamic=False)
def cast(weight: Tensor, scales: Tensor) -> Tensor:
    return (weight.float() / scales).to(torch.float8_e4m3fn)


@torch.compile(dynamic=False)
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.abs().amax(-1, keepdim=True).float() / 448
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def product(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    rows, of_rows = quantize(x)
    return torch._scaled_mm(rows, codes.t(), of_rows, scales.t(), out_dtype=torch.bfloat16, use_fast_accum=True)


def main() -> None:
    torch.manual_seed(0)
    dense = [random_weight(*shape) for shape in SHAPES.values()]
    resident = [fp8.quantize(weight) for weight in dense]
    both = [(weight, copy.codes, copy.scales) for weight, copy in zip(dense, resident, strict=True)]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(f"casting a layer alone: {milliseconds(lambda: [cast(w, s) for w, _, s in both], ROUNDS):.3f} ms\n")
    print("| rows | BF16 | resident FP8 | cast in every step | cast / resident |\n|---|---|---|---|---|")
    for rows in (2048, 4096, 8192, 16384):
        x = {k: torch.randn(rows, k, device="cuda", dtype=torch.bfloat16) for _, k in SHAPES.values()}
        bf16 = milliseconds(lambda: [torch.nn.functional.linear(x[w.shape[1]], w) for w, _, _ in both], ROUNDS)  # noqa: B023
        held = milliseconds(lambda: [product(c, s, x[c.shape[1]]) for _, c, s in both], ROUNDS)  # noqa: B023
        made = milliseconds(lambda: [product(cast(w, s), s, x[w.shape[1]]) for w, _, s in both], ROUNDS)  # noqa: B023
        print(f"| {rows} | {bf16:.2f} | {held:.2f} | {made:.2f} | {made / held:.2f} |", flush=True)


if __name__ == "__main__":
    main()
