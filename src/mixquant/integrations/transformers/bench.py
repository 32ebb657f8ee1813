"""Benchmarked engines on Transformers: models side by side in this process, each behind its own `generate`.

    prompts    one eager forward into a static cache; behind a cached prefix, the cache is rewound before each turn
    decode     on a GPU one graph: `generate` compiles the step whole, and CUDA graphs replay it; eager on CPUs, where
               compiling takes longer than it saves

A batch goes through `generate` from its beginning to its end, and nobody joins it: so there are no conversations and no
steps beside somebody else's prompt. The clock is this process's own, and the device is waited for whenever it is read:
times hold what `generate` does around the model.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    GenerationConfig,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import StaticLayer

from mixquant.bench.arms import TRANSFORMERS, EngineSpec
from mixquant.bench.play import Sample
from mixquant.bench.runner import Running
from mixquant.bench.workloads import Case, Decode, Tokens, tokens
from mixquant.checkpoint.locate import Found
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import load_with, made_up
from mixquant.integrations.transformers.quantizer import MixQuantConfig
from mixquant.model.explain import is_emulated, kernels_used
from mixquant.model.memory import memory

STOCK = ["torch.nn.Linear"]
"""The kernel of a model that is not converted."""

MANY_GRAPHS = 1 << 10
"""Of one model's code, for all arms and cases of a run; torch gives up compiling after eight."""


@dataclass(frozen=True, kw_only=True)
class TransformersBackend:
    """found: MODEL. dummy: make weights up."""

    found: Found
    device: torch.device
    dummy: bool = False
    name: str = TRANSFORMERS

    def start(self, specs: Sequence[EngineSpec]) -> dict[EngineSpec, Running | str]:
        """Models that are resident together, each ready, or why it does not load."""
        return {spec: self._started(spec) for spec in specs}

    def _started(self, spec: EngineSpec) -> Running | str:
        begin = time.perf_counter()
        try:
            model = self._model(spec)
        except Exception as error:  # of Transformers, torch, the hub
            text = str(error).strip() or type(error).__name__
            return text if isinstance(error, InputError) else f"Transformers: {text.splitlines()[0]}"
        graphs = decode_graphs(model.config) if self.device.type == "cuda" else None
        return TransformersRunning(model, graphs, time.perf_counter() - begin)

    def _model(self, spec: EngineSpec) -> PreTrainedModel:
        if self.dummy:
            return made_up(self.found, spec.policy, self.device)
        if spec.policy is None:
            return load_with(self.found, None, self.device)
        weights = spec.weights or self.found.quantized_as(spec.policy)
        return load_with(self.found, MixQuantConfig(spec.policy, prefill_weights=weights), self.device)


class TransformersRunning:
    """One model that waits for batches. Its static cache stays between the turns of a case, and with it the CUDA graphs
    that were captured for its addresses."""

    def __init__(self, model: PreTrainedModel, graphs: CompileConfig | None, seconds: float) -> None:
        self.model, self.graphs = model, graphs
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.facts = _facts(model, graphs) | {"start_s": round(seconds, 1)}
        self._case: Case | None = None
        self._cache: StaticCache | None = None
        model.generation_config = GenerationConfig(do_sample=False)  # no token ends an answer
        if graphs is not None:
            torch._dynamo.config.recompile_limit = MANY_GRAPHS
            torch._dynamo.config.accumulated_recompile_limit = MANY_GRAPHS

    def turn(self, case: Case, seed: object, short: bool = False) -> Sample:
        """One turn; a short one is as long, since compiling and capturing take some steps."""
        prefix = tokens(case.cached, self.vocabulary, "prefix", case.cached)
        if self._case is not case:
            self._case, self._cache = case, None  # the old one goes first
            self._cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=case.window)
            if prefix:
                self._generate([prefix], 1)
        self._rewind(case.cached)
        if isinstance(case.spec, Decode):
            prompts = [tokens(case.spec.behind, self.vocabulary, "behind", i) for i in range(case.batch)]
            return self._generate(prompts, case.spec.steps + 1).decoded()
        prompts = [prefix + tokens(case.new, self.vocabulary, seed, case.isl, i) for i in range(case.batch)]
        ms = self._generate(prompts, 1).first_ms
        return Sample(ms=ms, first_ms=[ms] * case.batch, hit_rate=case.cached / case.isl, written=case.batch)

    def switch(self, tail: int | None) -> None:
        self.model.mixquant_tracker.tail = self.model.mixquant_policy.tail if tail is None else tail

    def close(self) -> None:
        del self.model, self._cache
        if self.graphs is not None:
            torch.compiler.reset()  # graphs hold memory of their own
        gc.collect()
        torch.cuda.empty_cache()

    def _rewind(self, length: int) -> None:
        """Let the cache hold its first tokens only; what is behind them is masked, and overwritten."""
        assert self._cache is not None
        if not length:
            self._cache.reset()
            return
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)

    def _generate(self, prompts: Sequence[Tokens], answer: int) -> _Written:
        """Exactly `answer` tokens for each prompt, all of one length."""
        ids = torch.tensor(prompts, device=self.model.device)
        clock = _Clock(self.model.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=answer,
            past_key_values=self._cache,
            stopping_criteria=StoppingCriteriaList([clock]),
            compile_config=self.graphs,
        )
        return _Written(clock.begin, clock.first, clock.now(), len(prompts), answer - 1)


@dataclass(frozen=True)
class _Written:
    """begin, first, end: seconds of the clock, the second when every sequence had its first token."""

    begin: float
    first: float
    end: float
    batch: int
    steps: int

    @property
    def first_ms(self) -> float:
        return 1e3 * (self.first - self.begin)

    def decoded(self) -> Sample:
        step = 1e3 * (self.end - self.first) / self.steps
        return Sample(ms=step, step_ms=step, written=self.batch * (self.steps + 1))


class _Clock(StoppingCriteria):  # type: ignore[misc]
    """Is asked by `generate` after each token, notes when the first was there, and stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.first = math.nan
        self.begin = self.now()

    def now(self) -> float:
        """Seconds, once the device has done all that it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if math.isnan(self.first):
            self.first = self.now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def fitting(cases: Sequence[Case], config: Any) -> tuple[list[Case], list[str]]:
    """The cases that `generate` can play, and a sentence for each other one. config: the model's."""
    reasons = [_unplayable(case, config) for case in cases]
    kept = [case for case, reason in zip(cases, reasons, strict=True) if reason is None]
    if not kept:
        raise InputError(f"No case is left for --engine transformers: {reasons[0]}.")
    left = [(case, reason) for case, reason in zip(cases, reasons, strict=True) if reason is not None]
    return kept, [f"Left out {case.spec.workload}, {case.name}: {reason}." for case, reason in left]


def _unplayable(case: Case, config: Any) -> str | None:
    if isinstance(case.spec, Decode) and case.new:
        return "in Transformers nobody's prompt joins a batch that is written"
    if case.cached and not is_plain(config):
        return "a cache of this model cannot be rewound to its prefix"
    return None


def decode_graphs(config: Any) -> CompileConfig:
    """Decode as one graph, or an error; in Transformers' own mode, `reduce-overhead`.

    A graph for each batch size, but for models with windows: their caches count tokens by a Python number, and a graph
    for each number would be one for each step.
    """
    return CompileConfig(fullgraph=True, dynamic=False if is_plain(config) else None)


def is_plain(config: Any) -> bool:
    """Whether a model's static cache is keys and values of all tokens, in every layer: no window and no other state."""
    cache = StaticCache(config=config.get_text_config(), max_cache_len=1)
    return all(type(layer) is StaticLayer for layer in cache.layers)


def _facts(model: PreTrainedModel, graphs: CompileConfig | None) -> dict[str, Any]:
    """What is known of an engine, as JSON values."""
    converted = hasattr(model, "mixquant_policy")
    return {
        "kernels": kernels_used(model) if converted else {"prefill": STOCK, "decode": STOCK},
        "emulated": converted and is_emulated(model),
        "tail": model.mixquant_policy.tail if converted else None,
        "graphs": "NONE" if graphs is None else graphs.mode,
        "attention": [model.config._attn_implementation],
        "model_bytes": memory(model).total_bytes if converted else model.get_memory_footprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
