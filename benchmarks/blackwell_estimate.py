"""What NVFP4 prefill would gain on Blackwell: an estimate from published rates, not measured.

    python benchmarks/blackwell_estimate.py [--figure FILE.png]

The ratio of the times to the first token, BF16's over phase's (NVFP4 prompt, the default tail), for one fresh prompt;
under 1 phase is the slower. A step's linear layers take the longer of their arithmetic at the published rate and one
read of the weights that its tokens touch. Phase multiplies its tail a second time, in BF16, with the weights that the
tail touches, and quantizes activations in a pass of its own (one read of BF16, one write of 4.5 bits; what goes into
experts once). Attention is BF16 in both.

Experts are taken to be chosen uniformly: of 128, of which each token takes 8, a tail of 32 would touch 87 %, and read
them in BF16; by default it is 1 there, which touches 8. And NVFP4 experts are taken to run natively, which they do not
yet: vLLM's plugin emulates them on Blackwell. The lines of a mixture of experts say what native ones would give.

It is no bound. Both arms are given all of their rates: where a kernel reaches a smaller share in FP4 than in BF16, as
young kernels do, the gain is smaller. It is larger where the tail's product hides behind the other on a second stream,
or where a norm writes codes itself, so that their pass falls away: mixquant does both in places.

Rates, dense, sums in FP32, by NVIDIA's data sheets: B200 (HGX, 1,000 W) FP4 9,000 and BF16 2,250 TFLOP/s, 8 TB/s; RTX
5090 FP4 1,676 and BF16 209.5 TFLOP/s, 1.792 TB/s; DGX Spark FP4 500 TFLOP/s (half of the 1,000 that it is sold with,
which count zeros), 273 GB/s. For DGX Spark NVIDIA publishes no BF16 rate: the two lines take a quarter of its FP4 rate,
as B200 has it, and an eighth, as RTX 50 has it, whose architecture it shares. Memory is not asked: 30B-A3B in BF16 does
not fit into an RTX 5090.

`measured` is Mix-Quant's own, in its Figure 1 (arXiv 2605.20315): prefill latency on RTX 5090 GPUs, BF16 over NVFP4;
the estimate beside it has no tail either.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from mixquant.integrations.vllm.moe_defaults import TAIL_WITH_EXPERTS
from mixquant.policy import TAIL

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
    """A model's linear layers: weights that every token is multiplied by; values of a token that are quantized, all
    layers; attention: heads * head size * layers; weights of all experts, and the share of them that a token takes."""

    dense: float
    inputs: float
    attention: float
    experts: float = 0
    taken: float = 0

    @property
    def active(self) -> float:
        """Weights that a token is multiplied by."""
        return self.dense + self.taken * self.experts

    @property
    def tail(self) -> int:
        """The default."""
        return TAIL_WITH_EXPERTS if self.experts else TAIL

    def touched(self, tokens: int) -> float:
        """Weights that so many tokens are multiplied by, expected: experts are chosen uniformly."""
        return self.dense + self.experts * (1 - (1 - self.taken) ** tokens)


GPUS = {
    "B200": Gpu(fp4=9000e12, bf16=2250e12, memory=8e12),
    "RTX 5090": Gpu(fp4=1676e12, bf16=209.5e12, memory=1.792e12),
    "DGX Spark, BF16 at FP4/4": Gpu(fp4=500e12, bf16=125e12, memory=0.273e12),
    "DGX Spark, BF16 at FP4/8": Gpu(fp4=500e12, bf16=62.5e12, memory=0.273e12),
}
SHAPES = {
    "Qwen3-8B": Shape(
        dense=36 * (6144 * 4096 + 4096 * 4096 + 3 * 12288 * 4096),
        inputs=36 * (3 * 4096 + 12288),
        attention=36 * 32 * 128,
    ),
    "Qwen3-30B-A3B": Shape(
        dense=48 * (5120 * 2048 + 4096 * 2048),
        inputs=48 * (2 * 2048 + 4096 + 8 * 768),
        attention=48 * 32 * 128,
        experts=48 * 128 * 3 * 768 * 2048,
        taken=8 / 128,
    ),
}
BF16_BYTES, NVFP4_BYTES = 2, 4.5 / 8


def linear(gpu: Gpu, shape: Shape, tokens: int, rate: float, bytes_a_weight: float) -> float:
    """Seconds of all linear layers over so many tokens: arithmetic, or the weights' way from memory."""
    return max(2 * tokens * shape.active / rate, bytes_a_weight * shape.touched(tokens) / gpu.memory)


def first_token(gpu: Gpu, shape: Shape, tokens: int, tail: int | None) -> float:
    """Seconds; tail: of phase, None for BF16."""
    attention = 2 * tokens**2 * shape.attention / gpu.bf16  # two products, half of each masked
    if tail is None:
        return attention + linear(gpu, shape, tokens, gpu.bf16, BF16_BYTES)
    quantization = tokens * shape.inputs * (BF16_BYTES + NVFP4_BYTES) / gpu.memory
    precise = linear(gpu, shape, tail, gpu.bf16, BF16_BYTES) if tail else 0
    return attention + quantization + precise + linear(gpu, shape, tokens, gpu.fp4, NVFP4_BYTES)


def gain(gpu: Gpu, shape: Shape, tokens: int, tail: int | None = None) -> float:
    """tail: by default the shape's."""
    tail = shape.tail if tail is None else tail
    return first_token(gpu, shape, tokens, None) / first_token(gpu, shape, tokens, tail)


SAYS = """First token, BF16 over phase with NVFP4 prompts: computed from published rates, not measured. An estimate, \
no bound; under 1 phase is the slower.

- The default tail: {tail} tokens read all dense weights once more, in BF16; with experts {least} token, which reads 8 \
of 128 ({tail} would read {share} by uniform routing).
- Qwen3-30B-A3B: as if NVFP4 experts ran natively. They do not yet: vLLM's plugin emulates them on Blackwell.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    figure = parser.parse_args().figure
    print(SAYS.format(tail=TAIL, least=TAIL_WITH_EXPERTS, share=touched_experts()))
    print("| GPU | model | " + " | ".join(f"{tokens:,}" for tokens in CONTEXTS) + " |")
    print("|---" * (len(CONTEXTS) + 2) + "|")
    for gpu, rates in GPUS.items():
        for name, shape in SHAPES.items():
            print(f"| {gpu} | {name} | " + " | ".join(f"{gain(rates, shape, n):.2f}" for n in CONTEXTS) + " |")
    print("\nMeasured by others, without a tail, beside the estimate without one\n")
    print("| GPU | model | tokens | estimate | measured |\n|---|---|---|---|---|")
    for (gpu, name), points in MEASURED.items():
        for tokens, found in points.items():
            print(f"| {gpu} | {name} | {tokens:,} | {gain(GPUS[gpu], SHAPES[name], tokens, 0):.2f} | {found:.2f} |")
    if figure:
        draw(figure)


def touched_experts() -> str:
    """The share of experts that a tail of `TAIL` would touch."""
    shape = SHAPES["Qwen3-30B-A3B"]
    return f"{100 * (shape.touched(TAIL) - shape.dense) / shape.experts:.0f} %"


def draw(figure: Path) -> None:
    import matplotlib.pyplot as plt

    axes = plt.figure(figsize=(7, 4.5)).subplots()
    contexts = [2 ** (i / 4) for i in range(32, 69)]
    for color, (gpu, rates) in enumerate(GPUS.items()):
        for style, (name, shape) in zip(("-", "--"), SHAPES.items(), strict=True):
            gains = [gain(rates, shape, round(n)) for n in contexts]
            axes.plot(contexts, gains, style, color=f"C{color}", label=f"{gpu}; {name}")
            if points := MEASURED.get((gpu, name)):
                axes.plot(
                    *zip(*points.items(), strict=True),
                    "o",
                    color=f"C{color}",
                    label="measured by Mix-Quant, without a tail",
                )
    axes.axhline(1, color="gray", linewidth=0.8)  # under it phase is the slower
    axes.set(xscale="log", ylim=(0, None), xlabel="prompt tokens", ylabel="first token, BF16 / phase")
    axes.set_xticks(CONTEXTS, [f"{tokens:,}" for tokens in CONTEXTS], minor=False)
    axes.set_title(
        f"Computed, not measured: an estimate by published rates.\nA tail of {TAIL}, with experts of "
        f"{TAIL_WITH_EXPERTS}; NVFP4 experts as if they ran natively",
        fontsize=9,
    )
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.figure.savefig(figure, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
