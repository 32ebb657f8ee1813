"""Experts of one layer: all rows in BF16, all in FP8, and BF16 for a few before FP8 for all, as in a mixed step.

    python -m benchmarks.experts [SHAPE] [--backend triton]      # one GPU with FP8, vLLM: half a minute

SHAPE: of benchmarks/shapes.py, `30b-a3b` by default. Times are medians over rounds in which all arms take turns, in
microseconds for one layer: of the device in CUDA graphs, and in brackets of the host, which starts the kernels without
one. Where the host takes longer than the device, a step that is not captured waits for it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    FusedMoEQuantConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.oracle.unquantized import (
    make_unquantized_moe_kernel,
    select_unquantized_moe_backend,
)
from vllm.v1.worker.workspace import init_workspace_manager

from benchmarks.nested_linear import capture, replay
from benchmarks.shapes import config as shape_config
from mixquant.integrations.vllm.moe_kernels import RoutedRows, choose_experts
from mixquant.policy import Policy

ROWS = (256, 512, 1024, 2048, 4096, 8192)
FEW = 32
ROUNDS, COPIES = 9, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", default="30b-a3b")
    parser.add_argument("--backend", default="auto", choices=("auto", "triton"), help="vLLM's --moe-backend")
    args = parser.parse_args()
    torch.manual_seed(0)
    with set_current_vllm_config(VllmConfig()):
        init_workspace_manager(torch.device("cuda"))
        layer = Layer(args.shape, args.backend)
        largest = layer.rows(max(ROWS))
        layer.bf16(largest), layer.fp8(largest)  # vLLM's buffer grows now: graphs remember where it is
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {layer.names}\n")
        print("| rows | BF16, all | FP8, all | BF16 for 1 | BF16 for 32 | 1, then FP8 for all | 32, then FP8 for all |")
        print("|---" * 7 + "|")
        for count in ROWS:
            print(measure(layer, count), flush=True)


class Layer:
    """One set of experts with random weights, in BF16 and in FP8."""

    def __init__(self, shape: str, backend: str) -> None:
        model = shape_config(shape)
        number = getattr(model, "num_experts", None) or model.n_routed_experts
        hidden, inner, self.chosen = model.hidden_size, model.moe_intermediate_size, model.num_experts_per_tok
        self.moe = FusedMoEConfig(
            num_experts=number, num_local_experts=number, num_logical_experts=number, experts_per_token=self.chosen,
            hidden_dim=hidden, intermediate_size=inner, activation=MoEActivation.SILU, device="cuda",
            routing_method=RoutingMethodType.Renormalize, in_dtype=torch.bfloat16, moe_backend=backend,
            moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(), max_num_tokens=max(ROWS),
        )  # fmt: skip
        self.w13 = torch.randn(number, 2 * inner, hidden, device="cuda", dtype=torch.bfloat16) * 0.02
        self.w2 = torch.randn(number, hidden, inner, device="cuda", dtype=torch.bfloat16) * 0.02
        quantizer = choose_experts("fp8", self.moe, Policy(prefill="fp8"))
        assert quantizer is not None
        self.fp8 = quantizer.quantize(self.w13, self.w2)
        plain, kind = select_unquantized_moe_backend(self.moe)
        self.plain = make_unquantized_moe_kernel(FusedMoEQuantConfig.make(), self.moe, plain, kind)
        self.names = f"BF16 by {kind.__name__}, FP8 by {self.fp8.name}"

    def rows(self, count: int) -> RoutedRows:
        """Random rows, each with as many different experts as the model chooses."""
        x = torch.randn(count, self.moe.hidden_dim, device="cuda", dtype=torch.bfloat16)
        weights, ids = torch.rand(count, self.moe.num_experts, device="cuda").topk(self.chosen)
        return RoutedRows(x, weights / weights.sum(-1, keepdim=True), ids.int())

    def bf16(self, rows: RoutedRows) -> Any:
        return self.plain.apply(
            rows.x, self.w13, self.w2, topk_weights=rows.weights, topk_ids=rows.ids, expert_map=None,
            activation=self.moe.activation, global_num_experts=self.moe.num_experts, apply_router_weight_on_input=False,
        )  # fmt: skip


def measure(layer: Layer, count: int) -> str:
    """The line of the table for so many rows."""
    rows = layer.rows(count)
    one, some = rows[count - 1 :], rows[count - FEW :]
    arms: list[Callable[[], Any]] = [
        lambda: layer.bf16(rows),
        lambda: layer.fp8(rows),
        lambda: layer.bf16(one),
        lambda: layer.bf16(some),
        lambda: (layer.bf16(one), layer.fp8(rows)),
        lambda: (layer.bf16(some), layer.fp8(rows)),
    ]
    graphs = [capture(lambda arm=arm: [arm() for _ in range(COPIES)]) for arm in arms]
    rounds = [
        [(replay(graph) / COPIES, starting(arm)) for graph, arm in zip(graphs, arms, strict=True)]
        for _ in range(ROUNDS)
    ]
    medians = [[statistics.median(times) for times in zip(*arm, strict=True)] for arm in zip(*rounds, strict=True)]
    return f"| {count:,} | " + " | ".join(f"{device:,.0f} ({host:,.0f})" for device, host in medians) + " |"


def starting(arm: Callable[[], Any]) -> float:
    """Microseconds that the host takes to start the kernels of one call, when the device waits for nothing."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    arm()
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return taken * 1e6


if __name__ == "__main__":
    main()
