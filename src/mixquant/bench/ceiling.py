"""How fast it could be: what a figure's products, attention and reads take at rates measured on the same device.

    prompts   every token's products at the rate of a GEMM of 8,192 rows in the arm's prefill format, causal attention
              at the rate of one prompt of that length, and for the tail one read of the decode weights; prompts that
              are too short for the prefill format (`min_prompt`) at BF16's rate
    decode    one read of the decode weights and of the KV cache, by the bandwidth of a copy

All but norms, quantization, launches, the sampler and the scheduler, so that nobody gets there. Null where a part is
not known: experts (which ones are read depends on the tokens), formats without a measured rate, conversations, a step
beside a prompt, and devices on which nothing was measured (`Rates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mixquant.bench.arms import Arm
from mixquant.bench.memory import BYTES, NESTED, bytes_a_weight
from mixquant.bench.results import Row
from mixquant.bench.workloads import Case


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A dense decoder. linear: weights of all decoder linears; head: of the output layer, which reads last tokens only.
    cache: elements of the KV cache a token; attention: of a layer's heads, their number times their size."""

    linear: int
    head: int
    layers: int
    attention: int
    cache: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device. gemm: FLOP/s by format, of products as large as the model's; attention: FLOP/s of causal attention
    by prompt length; bandwidth: bytes a second."""

    gemm: Mapping[str, float]
    attention: Mapping[int, float]
    bandwidth: float


def beside(row: Row, case: Case, arm: Arm, facts: Mapping[str, Any]) -> Row:
    """The row with its ceiling, where there is one. facts: of the engine; `shape` and `rates` where they are known, and
    what it made of a policy that leaves it the choice: `kernels`, `min_prompt`."""
    shape, rates = facts.get("shape"), facts.get("rates")
    if not shape or not rates or row.emulated or not row.median:
        return row
    measured = Rates(
        gemm=rates["gemm"],
        attention={int(length): rate for length, rate in rates["attention"].items()},
        bandwidth=rates["bandwidth"],
    )
    nested = any("nested" in name for name in facts["kernels"]["decode"])
    ms = bound_ms(case, arm, Shape(**shape), measured, nested, facts.get("min_prompt", 0))
    return row if ms is None else row.model_copy(update={"ceiling_ms": ms, "ceiling_share": ms / row.median})


def bound_ms(
    case: Case, arm: Arm, shape: Shape, rates: Rates, nested: bool = False, min_prompt: int = 0
) -> float | None:
    """Milliseconds that a case takes at least; None where a part of it is not known.

    nested: whether decode reads nested weights. min_prompt: new tokens below which a prompt is read as decode is.
    """
    weights = shape.linear * (NESTED if nested else _bytes(arm))
    if case.spec.workload == "decode" and not case.new:
        behind = case.isl + case.spec.steps / 2
        read = weights + 2 * shape.head + case.batch * behind * shape.cache * 2
        return 1e3 * read / rates.bandwidth
    if case.spec.workload != "prompts":
        return None
    format = "bf16" if case.new < min_prompt else _format(arm)
    gemm = rates.gemm.get(format)
    attention = rates.attention.get(min(rates.attention, key=lambda length: abs(length - case.isl), default=0))
    if gemm is None or attention is None:
        return None
    products = 2 * shape.linear * case.new * case.batch / gemm
    causal = case.isl**2 - case.cached**2  # twice the pairs, and two products of them
    pairs = 2 * causal * shape.attention * shape.layers * case.batch / attention
    tail = weights / rates.bandwidth if arm.tail and format != "bf16" else 0.0
    return 1e3 * (products + pairs + tail)


def _format(arm: Arm) -> str:
    """Of prompt tokens."""
    return arm.spec.policy.prefill if arm.spec.policy else arm.spec.method or "bf16"


def _bytes(arm: Arm) -> float:
    """Bytes of a weight that a decode row reads, where it is not nested."""
    return BYTES[arm.spec.policy.decode] if arm.spec.policy else bytes_a_weight(arm.spec)
