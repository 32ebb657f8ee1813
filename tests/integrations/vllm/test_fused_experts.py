"""Quantized experts against a plain reference, without an engine: FP8 in vLLM's grouped kernels on a GPU.

    pytest tests/integrations/vllm/test_fused_experts.py

The reference takes FP8's codes and scales from `mixquant.formats.fp8` and sums in float64. Where CUDA is missing, the
same tests run with the emulated experts of a CPU: then only the kernels are left to compare on a GPU.

What rounding must leave depends on the numbers. Hopper's tensor cores are said to keep 13 bits of an FP8 sum behind its
leading one. Normal numbers lose 1e-3 of a sum by that, which moves some of what goes into the second product, or a
row's scale, to another value of FP8; simulated, that is 3e-3 to 3e-2 of the output, and leaving activations unquantized
4e-2. So there the direction counts: how far from the unquantized output the answer has gone towards the reference's.
Whole numbers up to 7, with powers of two as scales, are exact in FP8, and their sums fit into those bits. The second
product then has the reference's inputs; its own sums and BF16's rounding of outputs leave 2e-3 to 3e-3, and leaving
activations unquantized costs 2e-2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

from mixquant.formats import fp8
from mixquant.formats.rowwise import RowwiseTensor
from mixquant.integrations.vllm.moe_kernels import ExpertByExpert, ExpertSet, FusedFP8, RoutedRows, choose_experts
from mixquant.policy import Policy

CUDA = torch.cuda.is_available()
ROWS = 700
LIMITS = {"normal": 4e-2, "whole": 5e-3}  # of relative errors, by the kind of numbers
CONTROL = 1e-1  # the least relative error of what is wrong: two of 128 experts with each other's scales make 1.7e-1


@dataclass(frozen=True)
class Case:
    """hidden, inner, experts, experts a token; on a GPU vLLM's name of the kernels, too."""

    sizes: tuple[int, int, int, int]
    numbers: str
    backend: str = "auto"
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.device}-{'x'.join(map(str, self.sizes))}-{self.numbers}-{self.backend}"


SMALL, QWEN3_30B_A3B, GLM_45_AIR = (512, 256, 16, 4), (2048, 768, 128, 8), (4096, 1408, 128, 8)
# On Hopper, `auto` is CUTLASS.
ON_GPU = [Case(*each) for each in product((SMALL, QWEN3_30B_A3B, GLM_45_AIR), LIMITS, ("auto", "triton"))]
# Emulation rounds a product to BF16 before its scales too, which whole numbers do not notice.
ON_CPU = [Case(SMALL, "normal", dtype=torch.float32, device="cpu"), Case(SMALL, "whole", device="cpu")]


@dataclass(frozen=True)
class Experts:
    case: Case
    w13: Tensor
    w2: Tensor
    quantized: ExpertSet
    rows: RoutedRows

    def reference(self, rows: RoutedRows, fake: bool = True, swapped: tuple[int, ...] = ()) -> Tensor:
        """float64 [rows, H]. `fake`: activations are quantized; `swapped`: two experts with each other's scales."""
        out = torch.zeros(rows.x.shape, dtype=torch.float64, device=rows.device)
        for expert in rows.ids.unique().tolist():
            scaled = sum(swapped) - expert if expert in swapped else expert
            row, choice = (rows.ids == expert).nonzero(as_tuple=True)
            gate_and_up = multiplied(rows.x[row], self.w13[expert], self.w13[scaled], fake)
            down = multiplied(silu_and_mul(gate_and_up.to(rows.x.dtype)), self.w2[expert], self.w2[scaled], fake)
            out.index_add_(0, row, down * rows.weights[row, choice, None].double())
        return out


def multiplied(x: Tensor, weight: Tensor, scaled: Tensor, fake: bool) -> Tensor:
    """x @ weight.T in float64, with the codes of `weight` and the scales of `scaled`."""
    matrix = RowwiseTensor(fp8.quantize(weight).codes, fp8.quantize(scaled).scales)
    return fp8.quantize(x).matmul(matrix) if fake else x.double() @ matrix.dequantize().double().T


def silu_and_mul(gate_and_up: Tensor) -> Tensor:
    """By vLLM's operation, whose two roundings move codes; compared with the formula here."""
    gate, up = gate_and_up.double().chunk(2, -1)
    out = torch.empty_like(gate_and_up[:, : gate.shape[1]])
    apply_moe_activation(MoEActivation.SILU, out, gate_and_up)
    assert relative_error(out, gate * gate.sigmoid() * up) < 2**-8
    return out


def relative_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def moe_config(case: Case) -> Any:
    """vLLM's configuration of one layer of experts: the same for 0.26 and 0.32."""
    hidden, inner, experts, chosen = case.sizes
    return FusedMoEConfig(
        num_experts=experts, num_local_experts=experts, num_logical_experts=experts, experts_per_token=chosen,
        hidden_dim=hidden, intermediate_size=inner, activation=MoEActivation.SILU, device=case.device,
        routing_method=RoutingMethodType.Renormalize, in_dtype=case.dtype, moe_backend=case.backend,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(), max_num_tokens=ROWS,
    )  # fmt: skip


def drawn(case: Case, *shape: int, std: float = 1.0) -> Tensor:
    """Random numbers with about that deviation, which rows double, halve or leave: a wrong row's scale then shows."""
    if case.numbers == "whole":
        values = torch.randint(-7, 8, shape, device=case.device, dtype=case.dtype)  # each row reaches 7: 448 is 7 * 64
        values *= 2.0 ** round(math.log2(std / 4.3))
    else:
        values = torch.randn(shape, device=case.device, dtype=case.dtype) * std
    return values * 2.0 ** torch.randint(-1, 2, (*shape[:-1], 1), device=case.device).to(case.dtype)


@pytest.fixture(scope="module")
def vllm_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What an engine sets up for experts: a configuration; a GPU's workspaces, or the groups that emulation asks."""
    with set_current_vllm_config(VllmConfig()):
        if CUDA:
            init_workspace_manager(torch.device("cuda", torch.cuda.current_device()))
            yield
            reset_workspace_manager()
        else:
            init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('groups')}/store", 0, "gloo")
            initialize_model_parallel()
            yield
            cleanup_dist_env_and_memory()


@pytest.fixture(scope="module", params=ON_CPU + ON_GPU, ids=str)
def experts(request: pytest.FixtureRequest, vllm_alone: None) -> Experts:
    case: Case = request.param
    if (case.device == "cuda") != CUDA:
        pytest.skip("vLLM is built for CUDA here" if CUDA else "needs a CUDA device")
    torch.manual_seed(0)
    hidden, inner, number, chosen = case.sizes
    w13 = drawn(case, number, 2 * inner, hidden, std=hidden**-0.5)
    w2 = drawn(case, number, hidden, inner, std=inner**-0.5)
    quantizer = choose_experts("fp8", moe_config(case), Policy(prefill="fp8"))
    quantized = quantizer and quantizer.quantize(w13, w2)
    assert isinstance(quantized, FusedFP8 if case.device == "cuda" else ExpertByExpert)
    weights, ids = torch.randn(ROWS, number, device=case.device).softmax(-1).topk(chosen)
    rows = RoutedRows(drawn(case, ROWS, hidden), weights / weights.sum(-1, keepdim=True), ids.int())
    return Experts(case, w13, w2, quantized, rows)


@pytest.mark.parametrize("number", [1, 33, ROWS])
def test_equal_the_reference(experts: Experts, number: int) -> None:
    """Controls: activations that are not quantized go nothing of the way; two experts with each other's scales"""
    rows = experts.rows[:number]
    out, expected, plain = experts.quantized(rows), experts.reference(rows), experts.reference(rows, fake=False)
    faulty = experts.reference(rows, swapped=tuple(rows.ids[0, :2].tolist()))
    error, fault = relative_error(out, expected), relative_error(out[:1], faulty[:1])  # few others go to these two
    share = float(((out - plain) * (expected - plain)).sum() / (expected - plain).square().sum())
    figures = f"error {error:.1e}, of the way {share:.2f}; plain {relative_error(out, plain):.1e}, faulty {fault:.1e}"
    print(f"{experts.case}, {experts.quantized.name}, {number} rows: {figures}")
    assert error < LIMITS[experts.case.numbers], figures
    assert abs(share - 1) < 0.3, figures
    assert fault > CONTROL, figures


def test_rows_do_not_see_their_batch(experts: Experts) -> None:
    """Large mates would show in any scale that rows shared"""
    rows, number = experts.rows, 33
    mates = RoutedRows(torch.cat([rows.x[:number], 1000 * rows.x[number:]]), rows.weights, rows.ids)
    alone, together = experts.quantized(rows[:number]), experts.quantized(mates)
    assert relative_error(together[:number], alone) < LIMITS[experts.case.numbers]
    assert relative_error(together[1 : 1 + number], alone) > CONTROL


@pytest.mark.parametrize("number", [1, 33])
def test_cuda_graph(experts: Experts, number: int) -> None:
    """A graph that was captured with other rows and other experts gives the values of a call without it"""
    if experts.case.device == "cpu":
        pytest.skip("needs a CUDA device")
    held, fresh = (experts.rows[start : start + number] for start in (0, number))
    held = RoutedRows(held.x.clone(), held.weights.clone(), held.ids.clone())
    first, second = experts.quantized(held).clone(), experts.quantized(fresh).clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts.quantized(held)
    graph.replay()
    assert torch.equal(out, first)
    for mine, theirs in ((held.x, fresh.x), (held.weights, fresh.weights), (held.ids, fresh.ids)):
        mine.copy_(theirs)
    graph.replay()
    assert torch.equal(out, second)
    assert not torch.equal(first, second)
