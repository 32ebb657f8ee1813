"""What loading a converted model takes, against its bill: anonymous memory at the peak and after.

    python benchmarks/memory.py              # prints the table that benchmarks/results/ keeps

A Qwen3-shaped model of about 400M random parameters is saved once, then loaded in one fresh process per policy.
Anonymous memory leaves out the checkpoint's own pages, which the kernel maps and may drop at will. glibc is told to
give freed blocks of 1 MiB and more back at once: by default it keeps up to a few hundred MiB of them for reuse, which
`ps` then shows on top of what the model holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

import mixquant

POLICIES = (("bf16", "auto"), ("int8", "auto"), ("nvfp4", "auto"), ("uniform-int8", "auto"), ("fp8", "nested"))
"""Preset and storage."""


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(load(*sys.argv[1:])))
        return
    from cpu import random_model  # the folder of a script is on its path

    with tempfile.TemporaryDirectory() as folder:
        model = random_model(layers=8)
        layer = max(p.nbytes for name, p in model.named_parameters() if "proj" in name) / 2**20
        model.save_pretrained(folder)
        del model
        print(f"largest layer {layer:.0f} MiB; MiB of anonymous memory, beyond what the process held before")
        print(f"{'policy':<14}{'bill':>9}{'after':>9}{'after/bill':>12}{'peak':>9}{'peak - bill':>13}")
        for preset, storage in POLICIES:
            measured = load_in_fresh_process(folder, preset, storage)
            bill, after, peak = (measured[key] / 2**20 for key in ("bill", "after", "peak"))
            print(f"{preset:<14}{bill:>9.1f}{after:>9.1f}{after / bill:>12.3f}{peak:>9.1f}{peak - bill:>13.1f}")


def load_in_fresh_process(folder: str | Path, preset: str, storage: str = "auto") -> dict[str, int]:
    """Bytes: the bill, and anonymous memory after loading and at its peak."""
    result = subprocess.run(
        [sys.executable, __file__, str(folder), preset, storage],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        capture_output=True,
        text=True,
        check=True,
    )
    document: dict[str, int] = json.loads(result.stdout)
    return document


def load(folder: str, preset: str, storage: str) -> dict[str, int]:
    """Load one converted model in this process and watch its memory."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    policy = replace(mixquant.Policy.parse(preset), storage=storage)
    mixquant.convert_(tiny_model(), policy)  # builds what is built once: imports, fused loops, oneDNN's own buffers
    before = anonymous_bytes()
    peak, done = [before], threading.Event()
    watcher = threading.Thread(target=watch, args=(peak, done))
    watcher.start()
    config = mixquant.MixQuantConfig(policy)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    done.set()
    watcher.join()
    after = anonymous_bytes()
    return {"bill": mixquant.memory(model).total_bytes, "after": after - before, "peak": peak[0] - before}


def watch(peak: list[int], done: threading.Event) -> None:
    while not done.is_set():
        peak[0] = max(peak[0], anonymous_bytes())
        time.sleep(0.001)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def tiny_model() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


if __name__ == "__main__":
    main()
