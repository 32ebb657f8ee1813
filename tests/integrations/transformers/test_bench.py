"""The benchmark's engine on Transformers: what a turn computes, and that decode is one graph whatever turn it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, CompileConfig, Gemma3TextConfig, PreTrainedModel

import mixquant
from mixquant.bench.arms import EngineSpec
from mixquant.bench.workloads import Case, Decode, Prompts, tokens
from mixquant.checkpoint.locate import DEMO, find
from mixquant.errors import InputError
from mixquant.integrations.transformers.bench import (
    TransformersBackend,
    TransformersRunning,
    decode_graphs,
    fitting,
)
from mixquant.policy import Policy
from tests.conftest import VOCABULARY, seeded, tiny_qwen3
from tests.integrations.transformers.reference import CONTROL, EXACT, TwoModels, difference
from tests.integrations.transformers.test_families import TINY

DECODE = Decode(batches=[1, 3], behind=20, steps=8, reading=0, neighbours=[])
PROMPTS = Prompts(alone=[24], together=[24], requests=3, cached=[40], new=[9])


def cases(workload: Decode | Prompts) -> list[Case]:
    return list(workload.cases())


def sliding(window: int = 24) -> PreTrainedModel:
    changes = {"sliding_window": window, "layer_types": ["sliding_attention", "full_attention"]}
    return seeded(AutoModelForCausalLM.from_config(Gemma3TextConfig(**TINY | changes)).double())


def compiled(backend: str | Callable[..., Any] = "eager", dynamic: bool | None = False) -> CompileConfig:
    config = CompileConfig(backend=backend, mode=None, fullgraph=True, dynamic=dynamic)
    config._compile_all_devices = True  # otherwise generate compiles on accelerators only
    return config


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[tuple[int, Tensor]]]:
    """Of each forward: columns that it reads, and log-probs after the last one."""
    seen: list[tuple[int, Tensor]] = []

    def record(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((kwargs["input_ids"].shape[1], output.logits[:, -1].log_softmax(-1)))

    handle = model.register_forward_hook(record, with_kwargs=True)
    yield seen
    handle.remove()


def prompt(case: Case, seed: object, row: int = 0) -> Tensor:
    ids = tokens(case.cached, VOCABULARY, "prefix", case.cached) + tokens(case.new, VOCABULARY, seed, case.isl, row)
    return torch.tensor(ids)


def first(pair: TwoModels, ids: Tensor, cached: int = 0, tail: int = 1) -> Tensor:
    """Log-probs after a prompt, whose first `cached` tokens were a prompt of their own before."""
    cache, answer = pair.new_cache(), torch.tensor([0])
    if cached:
        pair.score(ids[:cached], answer, tail, cache)
    return pair.score(ids, answer, tail, cache)[0]


@pytest.mark.parametrize("case", cases(PROMPTS), ids=lambda case: case.name)
def test_a_turn_reads_new_tokens_only_and_answers_as_two_models(
    reference: TwoModels, phase: PreTrainedModel, case: Case
) -> None:
    running = TransformersRunning(copy.deepcopy(phase), None, 0.0)
    for seed in (1, 2):  # the second finds the cache that the first has left
        with recorded(running.model) as seen:
            sample = running.turn(case, seed)
        assert [columns for columns, _ in seen] == ([40] if case.cached and seed == 1 else []) + [case.new]
        assert sample.hit_rate == case.cached / case.isl
        assert len(sample.first_ms) == sample.written == case.batch
        for row, ours in enumerate(seen[-1][1]):
            ids = prompt(case, seed, row)
            assert difference(ours, first(reference, ids, case.cached)) < EXACT
            for control in reference.controls:
                assert difference(ours, first(control, ids, case.cached)) > CONTROL


def test_a_rewound_cache_is_as_good_as_a_new_one(plain: PreTrainedModel) -> None:
    (case,) = [case for case in cases(PROMPTS) if case.cached]
    running, pair = TransformersRunning(copy.deepcopy(plain), None, 0.0), TwoModels(plain, plain)
    for seed in (1, 2, 3):
        with recorded(running.model) as seen:
            running.turn(case, seed)
        assert difference(seen[-1][1][0], first(pair, prompt(case, seed))) < EXACT
        assert difference(seen[-1][1][0], first(pair, prompt(case, seed + 1))) > CONTROL


def test_the_tail_is_switched_between_turns(reference: TwoModels, phase: PreTrainedModel) -> None:
    (case, *_), running = cases(PROMPTS), TransformersRunning(copy.deepcopy(phase), None, 0.0)
    for tail in (5, 1, 0, None):  # the last: the policy's own
        running.switch(tail)
        with recorded(running.model) as seen:
            running.turn(case, 1)
        expected = running.model.mixquant_policy.tail if tail is None else tail
        assert difference(seen[0][1][0], first(reference, prompt(case, 1), tail=expected)) < EXACT
        assert difference(seen[0][1][0], first(reference, prompt(case, 1), tail=expected + 2)) > CONTROL


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("arm", ["phase", "uniform"])
def test_decode_is_one_graph_of_each_batch_size_and_never_compiled_again(arm: str) -> None:
    policy = {"prefill": "fp8", "decode": "fp8"} if arm == "uniform" else {"prefill": "fp8", "storage": "nested"}
    model = mixquant.convert_(tiny_qwen3(torch.bfloat16), policy | {"tail": 1})
    running = TransformersRunning(model, compiled(), 0.0)
    for number, case in enumerate(cases(DECODE), start=1):
        for turn in range(3):
            assert running.turn(case, turn).written == case.batch * (DECODE.steps + 1)
            assert counters["stats"]["unique_graphs"] == number
    assert not counters["graph_break"]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_window_is_no_graph_for_each_step() -> None:
    for dynamic, most in ((decode_graphs(sliding().config).dynamic, 3), (False, None)):
        torch._dynamo.reset()
        before = counters["stats"]["unique_graphs"]
        running = TransformersRunning(mixquant.convert_(sliding(), "fp8,tail=1"), compiled(dynamic=dynamic), 0.0)
        running.turn(cases(DECODE)[0], 0)
        made = counters["stats"]["unique_graphs"] - before
        assert made <= most if most else made >= DECODE.steps // 2
    assert decode_graphs(tiny_qwen3().config).dynamic is False


@pytest.mark.usefixtures("fresh_dynamo")
def test_what_a_graph_reads_stays_where_it_is(phase: PreTrainedModel) -> None:
    """CUDA graphs copy each input whose address may change, at each step. Only a step's tokens and mask may."""
    moving: list[int] = []
    fixed: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for node, value in zip(places, inputs, strict=True):
            static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            (moving if static is None else fixed).append(value.numel())
        return graph.forward

    running = TransformersRunning(copy.deepcopy(phase), compiled(backend), 0.0)
    running.turn(cases(DECODE)[0], 0)
    weights = sum(parameter.numel() for parameter in tiny_qwen3().parameters())
    assert sum(fixed) >= weights
    assert 0 < sum(moving) <= 2 * (DECODE.behind + DECODE.steps + 1)


def test_what_generate_cannot_play_is_left_out_and_said() -> None:
    asked = [*cases(Decode(batches=[1], neighbours=[2], reading=64)), *cases(PROMPTS)]
    kept, notes = fitting(asked, tiny_qwen3().config)
    assert [case.name for case in asked if case not in kept] == ["a step at batch 2 while 64 tokens are read"]
    (note,) = notes
    assert note.startswith("Left out decode, a step at batch 2 while 64 tokens are read: in Transformers nobody's")
    kept, notes = fitting(cases(PROMPTS), sliding().config)
    assert [case.cached for case in kept] == [0, 0]
    assert "cannot be rewound" in notes[0]
    with pytest.raises(InputError, match="No case is left"):
        fitting(cases(Decode(batches=[], neighbours=[2], reading=64)), tiny_qwen3().config)


def test_a_model_that_does_not_load_says_why() -> None:
    backend = TransformersBackend(found=find(DEMO), device=torch.device("cpu"))
    native = EngineSpec(policy=Policy(prefill="nvfp4", native=True))
    assert "nvfp4" in str(backend.start([native])[native])
