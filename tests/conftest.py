"""Which tests are slow, and the tiny random models that several test modules share: float64, seeded, and so rough that
quantization clearly shows.

A test is slow that starts an engine, a server or a browser, that compiles, or that takes ten seconds. The first are
found here: by their place, or by a fixture that they ask for. The last say so by a mark. `make quick` leaves out all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import mixquant
from tests.integrations.transformers.reference import TwoModels
from tests.servers import server as server

ENGINES = Path(__file__).parent / "integrations/vllm"
SLOW_FIXTURES = {"browser", "fresh_dynamo", "measured", "pair", "server"}
VOCABULARY = 64
PHASE = "nvfp4,tail=1"
"""The policy of most tests: their prompts are shorter than the tail that is the default."""


@pytest.hookimpl(tryfirst=True)  # before pytest deselects what is slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if ENGINES in item.path.parents or SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # one of several workers: long files first, so that they end together
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def seeded(model: nn.Module, std: float = 0.15) -> nn.Module:
    """Give every matrix of `model` seeded normal weights: log-probs then move by whole units when it is quantized."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(values * std)
    return model.eval()


def tiny_qwen3(dtype: torch.dtype = torch.float64, **changes: object) -> Qwen3ForCausalLM:
    """Three layers, hidden 64, grouped-query attention; `changes` override the configuration."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    }  # fmt: skip
    return seeded(Qwen3ForCausalLM(Qwen3Config(**sizes | changes)).to(dtype))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and one thread sums in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plain() -> PreTrainedModel:
    """The original model: tests copy it, and never change it."""
    return tiny_qwen3()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a tiny model in BF16: tests copy it, and never change it."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_qwen3(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def reference(plain: PreTrainedModel) -> TwoModels:
    """A quantized copy of `plain` that reads, and `plain` that writes."""
    return TwoModels.of(plain)


@pytest.fixture(scope="session")
def converted(plain: PreTrainedModel) -> Callable[..., PreTrainedModel]:
    """Copies of `plain` converted by mixquant, one for each policy of the session."""
    made: dict[mixquant.Policy, PreTrainedModel] = {}

    def convert(policy: object = PHASE) -> PreTrainedModel:
        key = mixquant.Policy.parse(policy)
        if key not in made:
            made[key] = mixquant.convert_(copy.deepcopy(plain), key)
        return made[key]

    return convert


@pytest.fixture(scope="session")
def phase(converted: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """`plain` under the policy of `PHASE`: quantized prompt, plain answer, tail of one."""
    return converted()


@pytest.fixture(scope="session")
def prompts() -> list[torch.Tensor]:
    """Three prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (24, 17, 9)]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No graphs from other tests, and an error where one function is compiled too often to go on compiling it. What a
    test changes of how often that is, ends with it."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = torch._dynamo.config
    kept = {name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with config.patch(fail_on_recompile_limit_hit=True, **kept):
        yield
    torch._dynamo.reset()
