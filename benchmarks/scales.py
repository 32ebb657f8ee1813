"""How much error each step of the offline recipe takes away: on synthetic layers, and on the layers of the demo model.

    python benchmarks/scales.py              # prints the tables that benchmarks/results/scales-cpu.txt keeps

Errors are relative squared errors times 1000, of weights [1024, 2048] or of outputs y = x @ W.T for 1,024 tokens.
`known` are the figures of an earlier study with its own random numbers, which says of its inputs no more than their
names; `off` is how far we are from them. We take: t5 and t3, Student's t; outlier channels, 16 random ones times 30;
correlated, Gaussians whose covariance has eigenvalues 1/sqrt(i) in a random basis, and 16 random channels times 20;
log-normal, channel sizes exp(N(0, 1)); tokens of all sizes, exp(N(0, 1)) too, and 16 channels times 20. What depends
on where the outliers fall is the mean of three draws, with their range. Steps that see data see 2,048 calibration
tokens of the same kind, never the tokens they are measured on. Activations are quantized with amax scales and a static
power-of-two global, 16 times the calibrated range.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.cpu import cpu_model
from mixquant import tasks
from mixquant.checkpoint.locate import find, locate
from mixquant.devices import device_name
from mixquant.formats import nvfp4, scales
from mixquant.formats.error import sqnr
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.offline import calibration_text, fold, gptq
from mixquant.offline.groups import Group, shared_groups
from mixquant.prompts import encode

N, K, CALIBRATION, TEST = 1024, 2048, 2048, 1024
TEST_SEED = 4
STEPS = ("amax", "search", "weighted", "gptq")
generator = torch.Generator()
normal: Callable[..., Tensor] = functools.partial(torch.randn, generator=generator)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{device_name(torch.device('cpu'))}, {cpu_model()}, torch {torch.__version__}")
    for section in (weights, inputs, products, correlated, headroom, demo_layers, speed):
        generator.manual_seed(0)
        section()
        sys.stdout.flush()


def student(degrees: int, *shape: int) -> Tensor:
    squares = torch.zeros(shape)
    for _ in range(degrees):
        squares += normal(*shape).square()
    return normal(*shape) / (squares / degrees).sqrt()


def with_outliers(x: Tensor, factor: float) -> Tensor:
    """16 random channels times `factor`."""
    x[:, torch.randperm(x.shape[1], generator=generator)[:16]] *= factor
    return x


def colored(tokens: int) -> Tensor:
    """Gaussians whose covariance has the eigenvalues 1/sqrt(i) in a random basis."""
    basis = torch.linalg.qr(normal(K, K))[0]
    return (normal(tokens, K) * torch.arange(1, K + 1) ** -0.25) @ basis


Rule = nvfp4.ScaleRule


def quantized(weight: Tensor, rule: Rule) -> Tensor:
    return nvfp4.quantize_weight(weight, rule).dequantize()


def exhaustive(weight: Tensor, global_scale: Tensor) -> Tensor:
    """The best of all 126 positive scales, by the benchmark's own loop over them."""
    shape = nvfp4.block_scales(weight, global_scale).shape
    best, least = torch.zeros(shape, dtype=torch.uint8), torch.full(shape, torch.inf)
    for code in range(1, 127):
        candidate = torch.full(shape, code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        rounded = nvfp4.encode(weight, global_scale, candidate).dequantize()
        error = nvfp4.blocks(rounded - weight).square().sum(-1)
        best, least = torch.where(error < least, code, best), torch.minimum(error, least)
    return best.to(torch.uint8).view(torch.float8_e4m3fn)


def four_six(x: Tensor, global_scale: Tensor) -> Tensor:
    """The better of amax / 6 and amax / 4, block by block (arXiv 2512.02010); not a part of mixquant."""
    tried = [nvfp4.block_scales(x * factor, global_scale) for factor in (1.0, 1.5)]
    errors = [nvfp4.encode(x, global_scale, each).dequantize() - x for each in tried]
    six, four = (nvfp4.blocks(error).square().sum(-1) for error in errors)
    return torch.where(four < six, tried[1].view(torch.uint8), tried[0].view(torch.uint8)).view(torch.float8_e4m3fn)


RULES: dict[str, Rule] = {"amax": nvfp4.block_scales, "4/6": four_six, "search": scales.search}


def activations(x: Tensor, amax: Tensor, rule: Rule = nvfp4.block_scales) -> Tensor:
    """Quantized with a static power-of-two global that covers 16 times the calibrated range."""
    return nvfp4.quantize(x, nvfp4.weight_global_scale(16.0 * amax), rule).dequantize()


def rotated(x: Tensor, size: int) -> Tensor:
    """Every `size` neighbours along K by a Hadamard matrix, which mixquant never does; 1 leaves x as it is."""
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return (x.view(-1, size) @ hadamard / size**0.5).view_as(x)


def relative(approximation: Tensor, exact: Tensor) -> float:
    """Relative squared error times 1000."""
    return 1000 * float((approximation - exact).square().sum() / exact.square().sum())


def by_gptq(weight: Tensor, hessian: Tensor, global_scale: Tensor, tokens: int) -> nvfp4.NVFP4Tensor:
    return gptq.quantize(weight, gptq.factor_(hessian.clone(), tokens), global_scale)


@dataclass
class Layer:
    """A weight and its input on calibration and on test tokens."""

    weight: Tensor
    calibration: Tensor
    test: Tensor

    @functools.cached_property
    def hessian(self) -> Tensor:
        return self.calibration.T @ self.calibration / len(self.calibration)

    def folded(self, factors: Tensor) -> Layer:
        return Layer(self.weight * factors, self.calibration / factors, self.test / factors)

    def rotated(self, size: int) -> Layer:
        return Layer(*(rotated(x, size) for x in (self.weight, self.calibration, self.test)))

    def rounded(self, step: str) -> Tensor:
        """The weight after a step of the recipe, or as it is."""
        if step == "exact":
            return self.weight
        if step == "gptq":
            amax = nvfp4.largest_magnitude(self.weight)
            q = by_gptq(self.weight, self.hessian, nvfp4.weight_global_scale(amax), len(self.calibration))
            return q.dequantize()
        weighted = functools.partial(scales.search, importance=self.hessian.diagonal())
        return quantized(self.weight, weighted if step == "weighted" else RULES[step])

    def errors(self, step: str, inputs: str = "amax") -> tuple[float, float]:
        """Of the output on the test tokens: with the inputs quantized too, by a rule, and with the weights alone."""
        exact, weight = self.test @ self.weight.T, self.rounded(step)
        rough = activations(self.test, nvfp4.largest_magnitude(self.calibration), RULES[inputs])
        return relative(rough @ weight.T, exact), relative(self.test @ weight.T, exact)


def show(name: str, here: float, known: float | None = None, note: str = "") -> None:
    print(f"{name:<48}{here:>8.2f}" + (f"{known:>8.2f}{here / known - 1:>+8.1%}" if known else " " * 16) + note)


def title(text: str) -> None:
    print(f"\n{text:<48}{'here':>8}{'known':>8}{'off':>8}")


def weights() -> None:
    title("weights alone")
    known = {
        "Gaussian": {1: (9.05, 7.56, 6.60), 16: (9.05, 7.56, 6.60), 128: (9.04, 7.56, 6.60)},
        "t5": {1: (8.53, 7.53, 6.75), 16: (9.21, 7.60, 6.60), 128: (9.07, 7.56, 6.59)},
    }
    for (name, rows), weight, best in zip(known.items(), (normal(N, K), student(5, N, K)), (6.602, 6.753), strict=True):
        alone(name, weight, rows, quantized)
        show(f"{name}, all 126 codes", relative(quantized(weight, exhaustive), weight), best)


def inputs() -> None:
    title("inputs alone")
    draws = (normal(TEST, K), student(3, TEST, K), with_outliers(normal(TEST, K), 30.0))
    known = {
        "Gaussian": {1: (9.06, 7.57, 6.60)},
        "t3": {1: (8.13, 7.47, 6.90), 16: (9.61, 7.51, 6.41)},
        "outlier channels": {1: (6.72, 6.38, 6.27), 16: (13.1, 7.33, 4.97), 128: (11.2, 7.79, 6.40)},
    }
    for (name, rows), x in zip(known.items(), draws, strict=True):
        alone(name, x, rows, lambda x, rule: activations(x, nvfp4.largest_magnitude(x), rule))


def alone(
    name: str, x: Tensor, known: dict[int, tuple[float, float, float]], quantize: Callable[[Tensor, Rule], Tensor]
) -> None:
    """A matrix by every rule, rotated by Hadamard matrices of several sizes."""
    for size, values in known.items():
        turned = rotated(x, size)
        for (rule, choose), value in zip(RULES.items(), values, strict=True):
            show(f"{name}{hadamard(size)}, {rule}", relative(quantize(turned, choose), turned), value)


def hadamard(size: int) -> str:
    return "" if size == 1 else f", H{size}"


COMBINATIONS = (
    *(("amax", "amax"), ("4/6", "amax"), ("search", "amax")),
    *(("4/6", "4/6"), ("search", "4/6"), ("search", "search")),
)
"""Rules of weights and of inputs."""


def products() -> None:
    title("outputs, Gaussian weights, uncorrelated inputs: W, A")
    draws = (normal(TEST, K), student(3, TEST, K), with_outliers(normal(TEST, K), 30.0))
    known = {
        "Gaussian": {1: (18.0, 16.6, 15.6, 15.1, 14.1, 13.1)},
        "t3": {
            1: (17.2, 15.7, 14.7, 15.1, 14.1, 13.5),
            16: (18.6, 17.1, 16.1, 15.1, 14.0, 13.0),
            128: (18.3, 16.8, 15.8, 15.1, 14.1, 13.2),
        },
        "outlier channels": {
            1: (15.8, 14.2, 13.2, 13.9, 12.9, 12.8),
            16: (22.1, 20.7, 19.3, 14.9, 13.7, 11.3),
            128: (20.1, 18.6, 17.6, 15.2, 14.2, 12.9),
        },
    }
    for (name, rows), x in zip(known.items(), draws, strict=True):
        layer = Layer(normal(N, K), x, x)
        for size, values in rows.items():
            turned = layer.rotated(size)
            for (step, rule), value in zip(COMBINATIONS, values, strict=True):
                show(f"{name}{hadamard(size)}: {step}, {rule}", turned.errors(step, rule)[0], value)


def correlated() -> None:
    """GPTQ has no `known`: the study's kept unweighted scales (11.8, folded 5.0), ours chooses them as it goes."""
    rows = CALIBRATION + TEST
    inputs: dict[str, tuple[Callable[[], Tensor], dict[str, float]]] = {
        "correlated + outlier channels": (
            lambda: with_outliers(colored(rows), 20.0),
            {
                **{"none: amax, amax": 17.5, "none: search, 4/6": 14.5},
                **{"none: weighted, amax": 10.3, "none: weighted, 4/6": 9.9},
                **{"fold: amax, amax": 6.43, "fold: search, 4/6": 5.51},
                **{"fold: weighted, amax": 5.5, "fold: weighted, 4/6": 5.0},
                **{"pow2: amax, amax": 6.5, "pow2: weighted, amax": 5.5, "pow2: weighted, 4/6": 5.1},
                **{"H16: amax, amax": 21.5, "H16: search, 4/6": 14.0, "H16: weighted, 4/6": 14.0},
                **{"H128: amax, amax": 19.2, "H128: search, 4/6": 14.4},
                **{"H128: weighted, amax": 16.8, "H128: weighted, 4/6": 14.3},
            },
        ),
        "log-normal channels": (
            lambda: normal(rows, K) * normal(K).exp(),
            {"none: amax, amax": 16.9, "fold: amax, amax": 10.1, "pow2: amax, amax": 11.0,
             "fold: weighted, 4/6": 7.4, "pow2: weighted, 4/6": 8.1},
        ),
        "correlated": (lambda: colored(rows), {"none: amax, amax": 17.9, "fold: amax, amax": 17.8}),
    }  # fmt: skip
    for name, (draw, known) in inputs.items():
        title(f"outputs, {name}: W, A")
        layers = [Layer(normal(N, K), x[:CALIBRATION], x[CALIBRATION:]) for x in (draw() for _ in range(3))]
        for transform in ("none", "fold", "pow2", "H16", "H128"):
            turned = [transformed(layer, transform) for layer in layers]
            for step in STEPS:
                for rule in ("amax", "4/6"):
                    values = [layer.errors(step, rule)[0] for layer in turned]
                    spread, row = f"   {min(values):.2f} .. {max(values):.2f}", f"{transform}: {step}, {rule}"
                    show(row, mean(values), known.get(row), spread)


def transformed(layer: Layer, transform: str) -> Layer:
    """Folded, rotated, or as it is."""
    if transform.startswith("H"):
        return layer.rotated(int(transform[1:]))
    return layer.folded(folding(layer, transform))


def folding(layer: Layer, transform: str) -> Tensor:
    """Factors: ones, (E[x^2] / E[w^2])^(1/4), or that as the product rounds it."""
    moment = layer.calibration.square().mean(0)
    if transform == "fold":
        return (moment / layer.weight.square().mean(0)) ** 0.25
    group = Group(layers=("layer",), producer="norm", run=K)
    tensors = {"layer.weight": layer.weight, "norm.weight": torch.ones(K)}
    return fold.factors(tensors, group, moment) if transform == "pow2" else torch.ones(K)


def headroom() -> None:
    """Below 4 the result hangs on the largest value that calibration happened to see: the study's was one draw."""
    title("inputs alone, static global, test tokens 4 times larger")
    rows = CALIBRATION + TEST
    for name, draw, known in (
        ("Gaussian", lambda: normal(rows, K), (94.9, 11.7, 9.03, 9.03, 9.03)),
        (
            "tokens of all sizes + outliers",
            lambda: with_outliers(normal(rows, K) * normal(rows, 1).exp(), 20.0),
            (72.6, 12.5, 8.32, 8.32, 8.46),
        ),
    ):
        errors = [beyond_calibration(draw()) for _ in range(8)]
        for (times, value), values in zip(zip(HEADROOMS, known, strict=True), zip(*errors, strict=True), strict=True):
            spread = f"   {min(values):.2f} .. {max(values):.2f}"
            show(f"{name}, headroom {times}", mean(values), value, spread)


HEADROOMS = (1, 2, 4, 16, 256)


def beyond_calibration(x: Tensor) -> list[float]:
    """The error of test tokens four times larger than the calibration tokens, by headroom."""
    amax, test = nvfp4.largest_magnitude(x[:CALIBRATION]), 4 * x[CALIBRATION:]
    covered = [nvfp4.E4M3_MAX * nvfp4.E2M1_MAX / (times * amax) for times in HEADROOMS]  # not rounded to powers of two
    return [relative(nvfp4.quantize(test, scale).dequantize(), test) for scale in covered]


def demo_layers() -> None:
    inputs = demo_inputs()
    tokens = len(next(iter(inputs.values()))[0])
    print(f"\nlinear layers of the demo model, {tokens:,} calibration tokens: SQNR of the output in dB on other")
    print(f"transcripts, mean over layers{'':<19}{'W and A':>8}{'W alone':>8}")
    for transform in ("none", "pow2"):
        errors = [[layer.errors(step) for step in (*STEPS, "exact")] for layer in demo_weights(inputs, transform)]
        for step, of_layers in zip((*STEPS, "exact"), zip(*errors, strict=True), strict=True):
            both, alone = (mean(sqnr(error / 1000) for error in kind) for kind in zip(*of_layers, strict=True))
            print(f"{transform + ' ' + step:<48}{both:>8.2f}{alone:>8.2f}")


@torch.inference_mode()
def demo_inputs() -> dict[Group, list[Tensor]]:
    """Each foldable group of the demo model with its input on calibration and on test transcripts: BF16 [tokens, K]."""
    model, tokenizer = demo_model(), load_tokenizer(find("demo"))
    seen: dict[Group, list[list[Tensor]]] = {group: [] for group in shared_groups(model) if group.producer}
    for group, parts in seen.items():
        module = model.get_submodule(group.layers[0])
        module.register_forward_pre_hook(lambda _, args, parts=parts: parts[-1].append(args[0][0]))
    for seed in (calibration_text.SEED, TEST_SEED):
        for parts in seen.values():
            parts.append([])
        for task, rung in itertools.product(tasks.LADDER, range(4)):
            model(encode(tokenizer, tasks.generate(task, rung, seed, 0).prompt))
    return {group: [torch.cat(rows) for rows in parts] for group, parts in seen.items()}


def demo_weights(inputs: dict[Group, list[Tensor]], transform: str) -> Iterator[Layer]:
    """The layers of the demo model, folded as `mixquant quantize --fold` does or not."""
    tensors = {name: parameter.detach() for name, parameter in demo_model().named_parameters()}
    divisors = {group: torch.ones(rows[0].shape[1]) for group, rows in inputs.items()}
    for group, (calibration, _) in inputs.items() if transform == "pow2" else ():
        divisors[group] = fold.factors(tensors, group, calibration.float().square().mean(0))
        fold.apply_(tensors, group, divisors[group])
    for group, rows in inputs.items():
        for name in group.layers:
            yield Layer(tensors[f"{name}.weight"].float(), *(part / divisors[group] for part in rows))


def demo_model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(locate("demo"), dtype=torch.bfloat16)


def speed() -> None:
    """CPU time on one thread, scaled to a billion weights."""
    print("\nminutes of one core for a billion weights, layer [1024, 2048]")
    weight, x = normal(N, K), normal(CALIBRATION, K)
    hessian = x.T @ x / CALIBRATION
    importance, amax = hessian.diagonal(), nvfp4.largest_magnitude(weight)
    weighted = functools.partial(scales.search, importance=importance)
    for name, work in (
        ("amax", lambda: nvfp4.quantize_weight(weight)),
        ("search", lambda: nvfp4.quantize_weight(weight, scales.search)),
        ("weighted search", lambda: nvfp4.quantize_weight(weight, weighted)),
        ("gptq", lambda: by_gptq(weight, hessian, nvfp4.weight_global_scale(amax), CALIBRATION)),
    ):
        print(f"{name:<48}{cpu_seconds(work) * 1e9 / weight.numel() / 60:>8.2f}")


def cpu_seconds(work: Callable[[], object]) -> float:
    """The median of five runs."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return sorted(seconds)[2]


if __name__ == "__main__":
    main()
