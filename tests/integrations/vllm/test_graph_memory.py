"""What CUDA graphs are said to take, by samples that an H200 gave."""

from __future__ import annotations

import pytest

from mixquant.integrations.vllm.graph_memory import GraphMemory

MIB = 1 << 20


CASES = [
    ("Qwen3-30B-A3B in BF16", {"piecewise": (51, [102, 6]), "full": (51, [258, 2])}, 0.64, 0.80),
    ("Qwen3-30B-A3B, prompts in FP8", {"piecewise": (57, [190, 20]), "full": (53, [2, 390])}, 21.08, 1.82),
]
"""By mode: graphs, and MiB of the first two; GiB by vLLM's estimate, and those that capturing took."""


@pytest.mark.parametrize(("model", "modes", "vllm", "took"), CASES, ids=[case[0] for case in CASES])
def test_the_estimate_is_what_capturing_took(
    model: str, modes: dict[str, tuple[int, list[int]]], vllm: float, took: float
) -> None:
    memory = GraphMemory(
        {mode: count for mode, (count, _) in modes.items()},
        {mode: [mib * MIB for mib in found] for mode, (_, found) in modes.items()},
    )
    assert memory.estimate() / 2**30 == pytest.approx(took, rel=0.1)
    assert memory.vllms() / 2**30 == pytest.approx(vllm, rel=0.1)
    assert memory.correct(memory.vllms()) == memory.estimate()
    assert memory.correct(memory.vllms() + 100 * MIB) == memory.estimate() + 100 * MIB  # an encoder's graphs


def test_a_mode_of_one_graph_is_its_sample() -> None:
    assert GraphMemory({"full": 1}, {"full": [7 * MIB]}).estimate() == 7 * MIB


def test_each_graph_takes_what_the_driver_takes() -> None:
    assert GraphMemory({"full": 10}, {"full": [7 * MIB, 0]}).estimate() == 7 * MIB + 8 * MIB
