"""How fast it could be: what a figure's products, attention and reads take at rates measured on the same device.

    prompts   every token's products at the rate of a GEMM of 8,192 rows in the arm's prefill format, causal attention
              at the rate of one prompt of that length, and for the tail one read of the decode weights; prompts that
              are too short for the prefill format (`min_prompt`) at BF16's rate
    decode    one read of the decode weights and of the KV cache, by the bandwidth of a copy
    agent     both of them: the products and the attention of what no cache can hold, the KV cache of every answer's
              tokens, and the decode weights for the conversation that writes most, in steps without a prompt beside

All but norms, quantization, launches, the sampler and the scheduler, so that nobody gets there. Null where a part is
not known: experts (which ones are read depends on the tokens), formats without a measured rate, a step beside a prompt,
and devices on which nothing was measured (`Rates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mixquant.bench.arms import Arm
from mixquant.bench.memory import BYTES, NESTED, bytes_a_weight
from mixquant.bench.results import Row
from mixquant.bench.workloads import Agent, Case


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
    bound = _Bound(arm, shape, rates, nested, min_prompt)
    try:
        if isinstance(case.spec, Agent):
            return 1e3 * bound.conversations(case.spec)
        if case.spec.workload == "decode" and not case.new:
            return 1e3 * bound.step(case.batch, behind=case.isl + case.spec.steps / 2)
        return 1e3 * bound.prompts(case) if case.spec.workload == "prompts" else None
    except KeyError:  # a rate that was not measured
        return None


@dataclass(frozen=True)
class _Bound:
    """Seconds that the parts of a case take at least. KeyError where a rate is not known."""

    arm: Arm
    shape: Shape
    rates: Rates
    nested: bool
    min_prompt: int

    def prompts(self, case: Case) -> float:
        mixed = self.arm.spec.policy is not None and self.arm.tail != 0 and self._format(case.new) != "bf16"
        tail = self._weights / self.rates.bandwidth if mixed else 0.0
        return case.batch * self._read(case.cached, case.isl) + tail

    def step(self, batch: float, behind: float) -> float:
        """One decode step. behind: tokens of each request in the KV cache."""
        return (self._weights + 2 * self.shape.head) / self.rates.bandwidth + self._attend(batch * behind)

    def conversations(self, spec: Agent) -> float:
        agents: set[int] = set()
        seconds, steps = 0.0, []
        for talk in spec.talks:
            for cached, isl, answer in talk.lengths(cached=talk.system if talk.agent in agents else 0):
                seconds += self._read(cached, isl) + self._attend((answer - 1) * (isl + answer / 2))
            agents.add(talk.agent)
            steps.append(sum(talk.answers) - spec.turns)  # a turn's prompt gives its answer's first token
        alone = max(steps) - spec.turns * spec.conversations  # steps that no prompt shares
        return seconds + max(alone, 0) * self.step(0, behind=0)

    def _read(self, cached: int, isl: int) -> float:
        """A prompt's products and attention."""
        products = 2 * self.shape.linear * (isl - cached) / self.rates.gemm[self._format(isl - cached)]
        causal = isl**2 - cached**2  # twice the pairs, and two products of them
        rate = self.rates.attention[min(self.rates.attention, key=lambda length: abs(length - isl), default=0)]
        return products + 2 * causal * self.shape.attention * self.shape.layers / rate

    def _attend(self, tokens: float) -> float:
        """Reading the KV cache of so many tokens."""
        return tokens * self.shape.cache * 2 / self.rates.bandwidth

    @property
    def _weights(self) -> float:
        """Bytes of all linear weights that a decode row reads."""
        policy = self.arm.spec.policy
        each = NESTED if self.nested else BYTES[policy.decode] if policy else bytes_a_weight(self.arm.spec)
        return self.shape.linear * each

    def _format(self, new: int) -> str:
        """Of a prompt with so many new tokens."""
        if new < self.min_prompt:
            return "bf16"
        return self.arm.spec.policy.prefill if self.arm.spec.policy else self.arm.spec.method or "bf16"
