"""Where the threads of `many_rows` are: samples of Nsight Compute, by what the sampled instruction is for.

    ncu --clock-control none --set full -k regex:many_rows -o profile python benchmarks/nested_profile.py
    ncu --import profile.ncu-rep --page source --csv >profile.csv
    python benchmarks/nested_profile.py profile.csv

A sample is one warp at one moment: producers' and those of the last CTAs too, which mostly wait. What a warp waits for
counts where it waits: for a block or another CTA at a branch or barrier, for a word at the instruction that wants it.
"""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from pathlib import Path

from mixquant.kernels import nvrtc
from mixquant.kernels.nested_cuda import Many, sources

CASES = ((32, "qkv", Many(32, 2, 4, 6)), (128, "gate_up", Many(128, 3, 1, 5)), (256, "gate_up", Many(256, 2, 2, 5)))
PURPOSES = {
    "rebuilding": r"LOP3|PRMT|VIADD|HMUL2|SHF|IMAD\.SHL",
    "reading words": r"LDS",
    "tensor cores": r"HGMMA|WARPGROUP",
    "waiting": r"BRA|SYNCS|UCGABAR|BAR|EXIT|BSYNC|WARPSYNC",
    "sums": r"STS|FADD|LD\.E|STG",
}


def launch() -> None:
    import torch

    from benchmarks.nested_linear import SHAPES, nest, random_weight

    device = torch.device("cuda", 0)
    for rows, layer, shape in CASES:
        n, k = SHAPES[layer]
        module = nvrtc.Module(nvrtc.compile_source(sources("sm_90a"), [shape.name], "sm_90a"), device)
        x = torch.randn(rows, k, device=device, dtype=torch.bfloat16)
        nest(random_weight(n, k)).start(shape.launch(rows, n), module, x, x.new_empty(rows, n), None)
        torch.cuda.synchronize()


def show(file: Path) -> None:
    samples: dict[str, Counter[str]] = {}
    kernel, head = "", []
    for row in csv.reader(file.open()):
        if row[:1] == ["Kernel Name"]:
            kernel = row[1].partition("(Weight")[0].replace("(int)", "")
        elif "Source" in row:
            head = row
        elif len(row) == len(head):
            found = dict(zip(head, row, strict=True))
            instruction = re.sub(r"^@!?U?P\d+\s+", "", found["Source"].strip())
            purpose = next((name for name, pattern in PURPOSES.items() if re.match(pattern, instruction)), "the rest")
            samples.setdefault(kernel, Counter())[purpose] += int(found["# Samples"] or 0)
    for kernel, counts in samples.items():
        shares = (f"{purpose} {counts[purpose] / counts.total():.1%}" for purpose in (*PURPOSES, "the rest"))
        print(f"{kernel}: {', '.join(shares)}; of {counts.total()} samples")


if __name__ == "__main__":
    show(Path(sys.argv[1])) if sys.argv[1:] else launch()
