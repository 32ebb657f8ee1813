"""What `many_rows` waits for: its time with one of its parts left out at a time (results are then wrong).

python benchmarks/nested_ablation.py       # one Hopper GPU: 20 s
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path
from unittest import mock

from mixquant.kernels import nvrtc
from mixquant.kernels.nested_cuda import Many, sources

CASES = [
    (16, "gate_up", Many(16, 3, 1, 9)),
    (32, "qkv", Many(32, 2, 4, 6)),
    (64, "down", Many(64, 3, 5, 7)),
    (64, "gate_up", Many(64, 3, 1, 7)),
    (128, "qkv", Many(128, 3, 3, 5)),
    (128, "gate_up", Many(128, 3, 1, 5)),
    (256, "gate_up", Many(256, 2, 2, 5)),
]
NO_ESCAPES = ("if (words.escapes & 0x7FF) patch", "if (words.escapes == 0x7FF) patch")
NOT_BROUGHT = "expect_bytes(full, 0); if (w.n > 0) continue;"
WITHOUT = {  # text of the source -> what stands there instead
    "nothing": (),
    "escapes": (NO_ESCAPES,),
    "rebuilding": (
        ("    const u32 lift = ", "    first = codes, second = nibbles; return; const u32 lift = "),
        NO_ESCAPES,
    ),
    "wgmma": (("part < X / WIDE; part++", "part < X / WIDE && w.n < 0; part++"),),
    "words": (("places.fetch(words,", "if (w.n < 0) places.fetch(words,"), NO_ESCAPES),
    "W": (("expect_bytes(full, WARPS * 1024 + tiles.count * (512 + 16));", NOT_BROUGHT), NO_ESCAPES),
    "x": (("expect_bytes(full, X * COLUMNS * 2);", NOT_BROUGHT),),
    "sums": (("first < rows; first +=", "first < 8; first +="),),
}


def compile_without(part: str, name: str) -> nvrtc.Compiled:
    return compile_edited(WITHOUT[part], name)


def compile_edited(edits: Sequence[tuple[str, str]], name: str) -> nvrtc.Compiled:
    """A kernel for Hopper, with text of its source replaced. ValueError for an edit that finds nothing."""
    files, found = sources("sm_90a"), set()
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            text = resources.files("mixquant.kernels").joinpath(file).read_text()
            for old, new in edits:
                found |= {old} if old in text else set()
                text = text.replace(old, new)
            Path(folder, file).write_text(text)
        if missing := [old for old, _ in edits if old not in found]:
            raise ValueError(f"not in the source: {missing[0]}")
        with mock.patch.object(nvrtc.resources, "files", return_value=Path(folder)):
            return nvrtc.compile_source(files, [name], "sm_90a")


def main() -> None:
    import torch

    from benchmarks.nested_linear import SHAPES, capture, nest, random_weight, replay

    jobs = [(part, name) for part in WITHOUT for name in dict.fromkeys(shape.name for _, _, shape in CASES)]
    with ProcessPoolExecutor() as pool:
        compiled = dict(zip(jobs, pool.map(compile_without, *zip(*jobs, strict=True)), strict=True))
    print("us without:", *WITHOUT, sep="\t", flush=True)
    device = torch.device("cuda", 0)
    weights = {layer: [random_weight(*SHAPES[layer]) for _ in range(3)] for layer in ("qkv", "gate_up", "down")}
    kernels = {layer: [nest(weight) for weight in group] for layer, group in weights.items()}
    for rows, layer, shape in CASES:
        times = []
        x = torch.randn(rows, SHAPES[layer][1], device=device, dtype=torch.bfloat16)
        outs = [x.new_empty(rows, SHAPES[layer][0]) for _ in kernels[layer]]
        for part in WITHOUT:
            module = nvrtc.Module(compiled[part, shape.name], device)

            def work(module: nvrtc.Module = module, x: torch.Tensor = x, outs: list[torch.Tensor] = outs) -> None:
                for kernel, out in zip(kernels[layer], outs, strict=True):  # noqa: B023
                    kernel.start(shape.launch(rows, SHAPES[layer][0]), module, x, out, None)  # noqa: B023

            graph = capture(work)
            times.append(statistics.median(replay(graph) for _ in range(9)) / len(outs))
        print(rows, layer, shape.name, *(f"{time:.1f}" for time in times), sep="\t", flush=True)


if __name__ == "__main__":
    main()
