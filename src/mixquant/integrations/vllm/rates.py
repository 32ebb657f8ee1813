"""What a GPU reaches on the parts that a benchmark's ceilings are made of, measured in an engine's idle worker.

    gemm        products of 8,192 rows with each of the model's linear weights, BF16 by cuBLAS and FP8 by row-wise
                `torch._scaled_mm`, quantization not included
    attention   one causal prompt of a length, by the FlashAttention that the engine itself runs
    bandwidth   a copy of 512 MiB, which reads and writes it

Medians over `REPEATS`, after one run that warms up. The engine's own layers give shapes only.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from mixquant.bench.ceiling import Rates, Shape

ROWS = 8192
REPEATS = 7

Weights = Counter[tuple[int, int]]
"""How often a weight of each shape [N, K] is there."""


def shape(runner: Any) -> Shape | None:
    """The model's shape; None where it is no dense decoder whose heads are all alike."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    modules = list(runner.get_model().modules())
    attention = [module for module in modules if isinstance(module, Attention)]
    sizes = {(layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size) for layer in attention}
    heads = [module for module in modules if isinstance(module, ParallelLMHead)]
    if len(sizes) != 1 or any(_holds_experts(module) for module in modules):
        return None
    queries, keys = sizes.pop()
    return Shape(
        linear=sum(n * k * count for (n, k), count in linears(runner).items()),
        head=heads[0].num_embeddings * heads[0].embedding_dim if heads else 0,
        layers=len(attention),
        attention=queries,
        cache=2 * keys * len(attention),
    )


def _holds_experts(module: Any) -> bool:
    name = type(module).__name__.lower()
    return "moe" in name or "experts" in name


def linears(runner: Any) -> Weights:
    """The weights of all decoder linears, as vLLM fuses them."""
    from vllm.model_executor.layers.linear import LinearBase

    found = (module for module in runner.get_model().modules() if isinstance(module, LinearBase))
    return Counter((module.output_size, module.input_size) for module in found)


def measure(runner: Any, lengths: Sequence[int]) -> Rates:
    """This device's rates for the model that an engine runs. lengths: of prompts."""
    device, weights = runner.device, linears(runner)
    copied = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    into = torch.empty_like(copied)
    bandwidth = 2 * copied.nbytes / _seconds(lambda: into.copy_(copied))
    return Rates(gemm=_products(weights, device), attention=_attention(runner, lengths), bandwidth=bandwidth)


def _products(weights: Weights, device: torch.device) -> dict[str, float]:
    rates = {"bf16": _rate(weights, lambda n, k: _bf16(n, k, device))}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        rates["fp8"] = _rate(weights, lambda n, k: _fp8(n, k, device))
    return rates


def _rate(weights: Weights, product: Callable[[int, int], Callable[[], Any]]) -> float:
    """FLOP/s over all of the model's products."""
    seconds = {shape: _seconds(product(*shape)) for shape in weights}
    return sum(2 * ROWS * n * k * count for (n, k), count in weights.items()) / sum(
        seconds[shape] * count for shape, count in weights.items()
    )


def _bf16(n: int, k: int, device: torch.device) -> Callable[[], Any]:
    x = torch.randn(ROWS, k, dtype=torch.bfloat16, device=device)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    return lambda: torch.nn.functional.linear(x, weight)


def _fp8(n: int, k: int, device: torch.device) -> Callable[[], Any]:
    x = torch.randn(ROWS, k, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(n, k, device=device).to(torch.float8_e4m3fn).t()
    rows, columns = torch.ones(ROWS, 1, device=device), torch.ones(1, n, device=device)
    return lambda: torch._scaled_mm(x, weight, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)


def _attention(runner: Any, lengths: Sequence[int]) -> dict[int, float]:
    """By length; empty where the engine does not run FlashAttention."""
    from vllm.model_executor.layers.attention import Attention

    layer = next(module for module in runner.get_model().modules() if isinstance(module, Attention))
    version = getattr(layer.impl, "vllm_flash_attn_version", None)
    if layer.attn_backend.get_name() != "FLASH_ATTN" or version is None:
        return {}
    return {length: _causal(layer, version, length, runner.device) for length in lengths}


def _causal(layer: Any, version: int, length: int, device: torch.device) -> float:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    heads, own, size = layer.num_heads, layer.num_kv_heads, layer.head_size
    q = torch.randn(length, heads, size, dtype=torch.bfloat16, device=device)
    k, v = (torch.randn(length, own, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    ends = torch.tensor([0, length], dtype=torch.int32, device=device)
    seconds = _seconds(
        lambda: flash_attn_varlen_func(
            q=q, k=k, v=v, max_seqlen_q=length, cu_seqlens_q=ends, max_seqlen_k=length, cu_seqlens_k=ends, causal=True,
            softmax_scale=size**-0.5, fa_version=version,
        )
    )  # fmt: skip
    return float(2 * length * length * heads * size / seconds)


def _seconds(work: Callable[[], Any]) -> float:
    """Of the GPU, by its own events."""
    work()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(statistics.median(times))


def as_facts(runner: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Shape and rates as plain values; empty where the model is no dense decoder, and without a GPU."""
    found = shape(runner)
    if found is None or runner.device.type != "cuda":
        return {}
    try:
        return {"shape": found.to_dict(), "rates": asdict(measure(runner, lengths))}
    finally:
        torch.cuda.empty_cache()  # neighbours on this GPU need it
