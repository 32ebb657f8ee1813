"""The arms of a benchmark: those of an evaluation, and what vLLM quantizes itself.

    chosen(["bf16", "vllm:fp8", "phase"], ["tail64=fp8,tail=64"], "fp8")

`vllm:METHOD` is stock vLLM under `--quantization METHOD`. Arms that differ in nothing but their tail share one engine:
the tail is read at each step, so a curve over seven tails costs one start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from mixquant.errors import InputError
from mixquant.evaluate.arms import Arm as EvaluatedArm
from mixquant.evaluate.arms import chosen as evaluated
from mixquant.policy import BY_ROLE, REFERENCE, Policy

STOCK = "vllm:"
VLLM, TRANSFORMERS = "vllm", "transformers"


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What an engine is started with. policy: None for a stock engine; method: stock vLLM's own quantization, if any.
    server: the address of one that runs already, of which nothing else is known. engine: vllm or transformers."""

    policy: Policy | None = None
    method: str | None = None
    weights: str | None = None
    server: str | None = None
    engine: str = VLLM

    @property
    def name(self) -> str:
        """As results call it."""
        if self.server is not None:
            return f"server at {self.server}"
        if self.policy is None:
            return f"{self.engine} --quantization {self.method}" if self.method else self.engine
        said = self.policy.to_dict()
        del said["tail"]
        said = {key: value for key, value in said.items() if value or (key == "min_prompt" and value is not None)}
        text = ", ".join(f"{key}={value}" for key, value in said.items())
        return f"{self.engine} with mixquant: {text}" + (f", weights={self.weights}" if self.weights else "")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: its engine, and the tail that is set before each of its requests; None: what the engine does anyway."""

    name: str
    spec: EngineSpec
    tail: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what a run is told by."""
        return {"engine": self.spec.name} | ({} if self.tail is None else {"tail": self.tail})


def chosen(names: Sequence[str], questions: Sequence[str], format: str, engine: str = VLLM) -> list[Arm]:
    """The arms in their order, stock BF16 first: it is what the others are compared with.

    InputError for unknown names, for controls (their batches are an evaluator's), without BF16, and for vLLM's own
    quantization in another engine.
    """
    stock = [name for name in names if name.startswith(STOCK)]
    if stock and engine != VLLM:
        raise InputError(f"{stock[0]} is an arm of vLLM: leave it out, or --engine {engine}.")
    known = evaluated([name for name in names if name not in stock], questions, format)
    if control := next((arm.name for arm in known.values() if arm.of), None):
        raise InputError(f"{control} is an arm of `mixquant eval`: leave it out.")
    if REFERENCE not in known:
        raise InputError(f"There is no yardstick: add {REFERENCE} to the arms.")
    if len(set(stock)) < len(stock):
        raise InputError("An arm is named twice: name each arm once.")
    found = {name: _stock(name) for name in stock} | {name: _ours(arm, engine) for name, arm in known.items()}
    order = [REFERENCE, *(name for name in (*names, *known) if name != REFERENCE)]
    return [found[name] for name in dict.fromkeys(order)]


def served(values: Sequence[str]) -> list[Arm]:
    """Arms on servers, from NAME=URL each. InputError for another form, a name that comes twice, and without BF16."""
    found: dict[str, Arm] = {}
    for value in values:
        name, _, url = value.partition("=")
        if not name or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise InputError(f"{value!r} names no server: write ARM=URL, such as phase=http://localhost:8000.")
        if name in found:
            raise InputError(f"The arm {name} has two servers: name one.")
        found[name] = Arm(name=name, spec=EngineSpec(server=url.rstrip("/").removesuffix("/v1")))
    if REFERENCE not in found:
        raise InputError(f"There is no yardstick: add --server {REFERENCE}=URL.")
    return [found.pop(REFERENCE), *found.values()]


def _stock(name: str) -> Arm:
    method = name.removeprefix(STOCK)
    if not method:
        raise InputError(f"{name} names no quantization of vLLM: write vllm:fp8.")
    return Arm(name=name, spec=EngineSpec(method=method))


def _ours(arm: EvaluatedArm, engine: str) -> Arm:
    if not any(arm.quantizes):
        return Arm(name=arm.name, spec=EngineSpec(engine=engine))
    policy = replace(arm.policy, tail=BY_ROLE)
    spec = EngineSpec(policy=policy, weights=arm.weights, engine=engine)
    return Arm(name=arm.name, spec=spec, tail=arm.policy.tail if arm.names_tail else None)


def specs(arms: Iterable[Arm]) -> list[EngineSpec]:
    """The engines that the arms need, each once."""
    return list(dict.fromkeys(arm.spec for arm in arms))
