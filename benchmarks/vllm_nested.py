"""Nested weights inside stock vLLM against stock BF16 and against two copies: memory, decode step, time to first token.

    python benchmarks/vllm_nested.py OUT        # one GPU of 139 GiB with FP8

Three engines of a model of Qwen3-8B's shape with dummy weights start side by side, share the GPU and take turns within
each round. What vLLM itself says of their memory ("Model loading took") is printed below the table.
"""

from __future__ import annotations

import argparse
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.vllm_phases import SIZES, Bench, decode_step, fresh, seconds

PHASE = {"quant_method": "mixquant", "prefill": "fp8"}
ENGINES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "two copies": {"hf_overrides": {"quantization_config": PHASE | {"storage": "separate"}}},
    "nested": {"hf_overrides": {"quantization_config": PHASE | {"storage": "nested"}}},
}
BATCHES = (1, 8, 16, 32, 64, 128)
PROMPTS = (2048, 8192, 32768)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    folder = write_config(args.out / "model")
    with ThreadPoolExecutor(len(ENGINES)) as pool:
        started = list(pool.map(functools.partial(start, folder), ENGINES.values()))
    engines = dict(zip(ENGINES, started, strict=True))
    bench = Bench(engines, {name: (name, None) for name in engines}, args.rounds)
    print(f"\n| ms, median of {args.rounds} | " + " | ".join(engines) + " | ratios to BF16 |")
    print("|---" * (len(engines) + 2) + "|", flush=True)
    rows = []
    for batch in BATCHES:
        prompts = fresh(batch, 256)
        rows.append(bench.row(f"decode step, batch {batch}", lambda llm, p=prompts: decode_step(llm, p)))
    for tokens in PROMPTS:
        rows.append(bench.row(f"TTFT, {tokens} tokens", lambda llm, n=tokens: seconds(llm, fresh(1, n), 1)))
    for name, llm in engines.items():
        loaded = llm.collective_rpc(model_bytes)[0]
        print(f"{name}: model loading took {loaded / 2**30:.2f} GiB")
    (args.out / "vllm-nested.json").write_text(json.dumps(rows, indent=1))


def model_bytes(worker: Any) -> int:
    """What vLLM's own line "Model loading took" says."""
    return int(worker.model_runner.model_memory_usage)


def write_config(folder: Path) -> Path:
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config

    Qwen3Config(
        **SIZES["8b"], vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        dtype="bfloat16", architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    # What stands for weights that `load_format="dummy"` makes up.
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def start(folder: Path, options: dict[str, Any]) -> Any:
    """An engine with vLLM's own defaults but for the batch's size and the memory share."""
    from vllm import LLM

    return LLM(
        str(folder), skip_tokenizer_init=True, load_format="dummy", gpu_memory_utilization=0.28, max_num_seqs=256,
        max_model_len=33024, max_num_batched_tokens=8192, enable_prefix_caching=True, seed=0,
        kv_cache_memory_bytes=12 << 30,  # of three engines that start at once none can measure what is left
        **options,
    )  # fmt: skip


if __name__ == "__main__":
    main()
