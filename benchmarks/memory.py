"""What loading a converted model takes, against its bill: the process's own memory, and pages of mapped files.

    python benchmarks/memory.py              # prints the table that benchmarks/results/ keeps

A Qwen3-shaped model of random parameters, 380M of them in linear layers and 67M in each embedding, is saved with tied
and with two embeddings, then loaded in one fresh process per policy. Own memory is anonymous memory, after loading and
at its peak; mapped is what is resident of the checkpoint's files. glibc is told to give freed blocks of 1 MiB and more
back at once: by default it keeps up to a few hundred MiB of them for reuse, which `ps` then shows on top of what the
model holds.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import mixquant
from benchmarks.cpu import random_model
from benchmarks.own_memory import in_fresh_process, resident_bytes, watched

POLICIES = (("bf16", "auto"), ("int8", "auto"), ("nvfp4", "auto"), ("uniform-int8", "auto"), ("fp8", "nested"))
"""Preset and storage."""


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(load(*sys.argv[1:])))
        return
    print("MiB; own memory beyond what the process held before, and pages of the checkpoint's files")
    print(f"{'embeddings':<12}{'policy':<14}{'own bill':>9}{'own':>9}{'own/bill':>10}{'peak':>9}", end="")
    print(f"{'mapped bill':>13}{'mapped':>9}{'all/bill':>10}")
    for tied in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            random_model(layers=8, vocab_size=32_768, tie_word_embeddings=tied).save_pretrained(folder)
            for preset, storage in POLICIES:
                measured = json.loads(in_fresh_process(__file__, folder, preset, storage))
                print(f"{'tied' if tied else 'two':<12}{row(preset, measured)}")


def row(preset: str, measured: dict[str, int]) -> str:
    own, after, peak, bill, mapped = (
        measured[key] / 2**20 for key in ("own_bill", "own", "peak", "mapped_bill", "mapped")
    )
    share, shares = after / own, (after + mapped) / (own + bill)
    return f"{preset:<14}{own:>9.1f}{after:>9.1f}{share:>10.3f}{peak:>9.1f}{bill:>13.1f}{mapped:>9.1f}{shares:>10.3f}"


def load(folder: str, preset: str, storage: str) -> dict[str, int]:
    """Load one converted model in this process. Bytes: the bill, own memory, and what is resident of mapped files."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    policy = replace(mixquant.Policy.parse(preset), storage=storage)
    with tempfile.TemporaryDirectory() as tiny:  # builds what is built once: imports, fused loops, oneDNN's own buffers
        tiny_model().save_pretrained(tiny)
        AutoModelForCausalLM.from_pretrained(tiny, quantization_config=mixquant.MixQuantConfig(policy))
    config = mixquant.MixQuantConfig(policy)
    with watched() as taken:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    bill = mixquant.memory(model)
    mapped = sum(map(resident_bytes, Path(folder).resolve().glob("*.safetensors")))
    return {
        "own_bill": bill.own_bytes, "own": taken.after, "peak": taken.peak,
        "mapped_bill": bill.mapped_bytes, "mapped": mapped,
    }  # fmt: skip


def tiny_model() -> torch.nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


if __name__ == "__main__":
    main()
