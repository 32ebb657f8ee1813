"""What NVFP4 prefill can gain on Blackwell at most: computed from published rates, not measured.

    python benchmarks/blackwell_bound.py [--figure FILE.png]

The ratio of the times to the first token, BF16's over phase's (NVFP4 prompt, tail of one token), for one fresh prompt.
A step's linear layers take the longer of their arithmetic at the published rate and one read of their weights; phase
also quantizes activations (one read of BF16, one write of 4.5 bits) and reads the BF16 weights once more for its tail.
Attention is BF16 in both. Both arms are given all of their rates: where a kernel reaches a smaller share in FP4 than in
BF16, as young kernels do, the gain is smaller. So these are bounds.

Rates, dense, sums in FP32, by NVIDIA's data sheets: B200 (HGX, 1,000 W) FP4 9,000 and BF16 2,250 TFLOP/s, 8 TB/s; RTX
5090 FP4 1,676 and BF16 209.5 TFLOP/s, 1.792 TB/s; DGX Spark FP4 500 TFLOP/s (half of the 1,000 that it is sold with,
which count zeros), 273 GB/s. For DGX Spark NVIDIA publishes no BF16 rate: the two lines take a quarter of its FP4 rate,
as B200 has it, and an eighth, as RTX 50 has it, whose architecture it shares. Memory is not asked: 30B-A3B in BF16 does
not fit into an RTX 5090.

`measured` is Mix-Quant's own, in its Figure 1 (arXiv 2605.20315): prefill latency on RTX 5090 GPUs, BF16 over NVFP4.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

CONTEXTS = (512, 2048, 8192, 32768, 131072)
MEASURED = {("RTX 5090", "Qwen3-8B"): {2048: 3.51, 4096: 3.20, 8192: 2.80, 16384: 2.42, 32768: 1.96}}


@dataclass(frozen=True)
class Gpu:
    """Operations and bytes a second."""

    fp4: float
    bf16: float
    memory: float


@dataclass(frozen=True)
class Shape:
    """A model's linear layers: weights that a token is multiplied by, and weights that there are; inputs of linear
    layers by token, all layers; and attention: heads * head size * layers."""

    active: float
    weights: float
    inputs: float
    attention: float


GPUS = {
    "B200": Gpu(fp4=9000e12, bf16=2250e12, memory=8e12),
    "RTX 5090": Gpu(fp4=1676e12, bf16=209.5e12, memory=1.792e12),
    "DGX Spark, BF16 at FP4/4": Gpu(fp4=500e12, bf16=125e12, memory=0.273e12),
    "DGX Spark, BF16 at FP4/8": Gpu(fp4=500e12, bf16=62.5e12, memory=0.273e12),
}
SHAPES = {
    "Qwen3-8B": Shape(
        active=36 * (6144 * 4096 + 4096 * 4096 + 3 * 12288 * 4096),
        weights=36 * (6144 * 4096 + 4096 * 4096 + 3 * 12288 * 4096),
        inputs=36 * (3 * 4096 + 12288),
        attention=36 * 32 * 128,
    ),
    "Qwen3-30B-A3B": Shape(
        active=48 * (5120 * 2048 + 4096 * 2048 + 8 * 3 * 768 * 2048),
        weights=48 * (5120 * 2048 + 4096 * 2048 + 128 * 3 * 768 * 2048),
        inputs=48 * (2048 + 4096 + 8 * (2048 + 768)),
        attention=48 * 32 * 128,
    ),
}
NVFP4_BYTES = 4.5 / 8


def first_token(gpu: Gpu, shape: Shape, tokens: int, phase: bool) -> float:
    """Seconds, at least."""
    attention = 2 * tokens**2 * shape.attention / gpu.bf16  # two products, half of each masked
    arithmetic = 2 * tokens * shape.active
    if not phase:
        return attention + max(arithmetic / gpu.bf16, 2 * shape.weights / gpu.memory)
    quantization = tokens * shape.inputs * (2 + NVFP4_BYTES) / gpu.memory
    tail = 2 * shape.active / gpu.memory
    return attention + quantization + tail + max(arithmetic / gpu.fp4, NVFP4_BYTES * shape.weights / gpu.memory)


def gain(gpu: Gpu, shape: Shape, tokens: int) -> float:
    return first_token(gpu, shape, tokens, phase=False) / first_token(gpu, shape, tokens, phase=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    figure = parser.parse_args().figure
    print("Computed from published rates, not measured: first token, BF16 over phase with NVFP4 prompts, at most\n")
    print("| GPU | model | " + " | ".join(f"{tokens:,}" for tokens in CONTEXTS) + " |")
    print("|---" * (len(CONTEXTS) + 2) + "|")
    for gpu, rates in GPUS.items():
        for name, shape in SHAPES.items():
            print(f"| {gpu} | {name} | " + " | ".join(f"{gain(rates, shape, n):.2f}" for n in CONTEXTS) + " |")
    print("\nMeasured by others beside the bound\n\n| GPU | model | tokens | bound | measured |\n|---|---|---|---|---|")
    for (gpu, name), points in MEASURED.items():
        for tokens, found in points.items():
            print(f"| {gpu} | {name} | {tokens:,} | {gain(GPUS[gpu], SHAPES[name], tokens):.2f} | {found:.2f} |")
    if figure:
        draw(figure)


def draw(figure: Path) -> None:
    import matplotlib.pyplot as plt

    axes = plt.figure(figsize=(7, 4.5)).subplots()
    contexts = [2 ** (i / 4) for i in range(32, 69)]
    for color, (gpu, rates) in enumerate(GPUS.items()):
        for style, (name, shape) in zip(("-", "--"), SHAPES.items(), strict=True):
            gains = [gain(rates, shape, round(n)) for n in contexts]
            axes.plot(contexts, gains, style, color=f"C{color}", label=f"{gpu}; {name}")
            if points := MEASURED.get((gpu, name)):
                axes.plot(*zip(*points.items(), strict=True), "o", color=f"C{color}", label="measured by Mix-Quant")
    axes.set(xscale="log", ylim=(1, None), xlabel="prompt tokens", ylabel="first token, BF16 / phase")
    axes.set_xticks(CONTEXTS, [f"{tokens:,}" for tokens in CONTEXTS], minor=False)
    axes.set_title("Computed, not measured: at most this much, by published rates", fontsize=10)
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.figure.savefig(figure, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
