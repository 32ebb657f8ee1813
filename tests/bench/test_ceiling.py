"""Ceilings of a shape and rates whose sums are easy."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixquant.bench.arms import Arm, chosen
from mixquant.bench.ceiling import Rates, Shape, beside, bound_ms
from mixquant.bench.results import read as read_results
from mixquant.bench.workloads import Agent, Case, Decode, Prompts, read

from .sample import row

ROOT = Path(__file__).parents[2]
SHAPE = Shape(linear=10**9, head=10**8, layers=10, attention=1000, cache=2000)
RATES = Rates(gemm={"bf16": 1e12, "fp8": 2e12}, attention={1000: 1e12, 4000: 2e12}, bandwidth=1e12)
BF16, STOCK, PHASE, BARE = chosen(["bf16", "vllm:fp8", "phase"], ["bare=fp8,tail=0"], "fp8")


def prompt(new: int, cached: int = 0) -> Case:
    return next(
        iter(Prompts(alone=[] if cached else [new], together=[], cached=[cached] if cached else [], new=[new]).cases())
    )


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        (BF16, 2000 + 20),  # 2 x 10^9 x 1,000 products at 10^12; 2 x 1,000^2 x 1,000 x 10 of attention at 10^12
        (STOCK, 1000 + 20),
        (BARE, 1000 + 20),
        (PHASE, 1000 + 20 + 2),  # the tail: one read of 10^9 weights of two bytes
    ],
)
def test_a_prompt(arm: Arm, expected: float) -> None:
    assert bound_ms(prompt(1000), arm, SHAPE, RATES) == pytest.approx(expected)


def test_nested_weights_are_read_in_twelve_bits() -> None:
    assert bound_ms(prompt(1000), PHASE, SHAPE, RATES, nested=True) == pytest.approx(1000 + 20 + 1.5)


def test_a_prompt_below_the_least_is_bf16s() -> None:
    assert bound_ms(prompt(1000), PHASE, SHAPE, RATES, min_prompt=1001) == bound_ms(prompt(1000), BF16, SHAPE, RATES)
    assert bound_ms(prompt(1000), PHASE, SHAPE, RATES, min_prompt=1000) == pytest.approx(1000 + 20 + 2)


def test_a_short_turn_attends_to_what_is_cached() -> None:
    pairs = 2 * (4000**2 - 3000**2) * 1000 * 10 / 2e12
    assert bound_ms(prompt(1000, 3000), BF16, SHAPE, RATES) == pytest.approx(2000 + 1e3 * pairs)


@pytest.mark.parametrize(("arm", "nested", "weights"), [(BF16, False, 2), (STOCK, False, 1), (PHASE, True, 1.5)])
def test_a_decode_step_reads_weights_head_and_cache(arm: Arm, nested: bool, weights: float) -> None:
    (case,) = Decode(batches=[4], behind=80, steps=40, reading=0).cases()
    read = weights * 10**9 + 2 * 10**8 + 4 * 100 * 2000 * 2
    assert bound_ms(case, arm, SHAPE, RATES, nested) == pytest.approx(read / 1e9)


def test_conversations_read_what_no_cache_holds_and_all_that_they_have_said() -> None:
    spec = Agent(conversations=2, turns=2, agents=1, system=(1000, 1000), tool=(100, 100), answer=(11, 11))
    (case,) = spec.cases()
    first, second = (0, 1100), (1110, 1211)  # an answer's last token is read by the next turn
    shared = (1000, 1100)
    turns = [first, second, shared, second]
    products = 2e9 * sum(isl - cached for cached, isl in turns)
    attention = 2e4 * sum(isl**2 - cached**2 for cached, isl in turns) / 1e12
    cache = 2 * sum(isl + place for _, isl in turns for place in range(1, 11)) * 2000 / 1e12
    alone = 2 * 10 - 4  # steps of one conversation, less those in which a prompt may be read
    for arm, nested, gemm, weights in ((BF16, False, 1e12, 2), (STOCK, False, 2e12, 1), (PHASE, True, 2e12, 1.5)):
        seconds = products / gemm + attention + cache + alone * (weights * 1e9 + 2e8) / 1e12
        assert bound_ms(case, arm, SHAPE, RATES, nested) == pytest.approx(1e3 * seconds)


def test_what_the_documents_say_that_agents_read() -> None:
    results = read_results(ROOT / "benchmarks/results/bench-8b-h200-agent.json")
    (spec,) = read([str(ROOT / "benchmarks/workloads/agent.json")])
    assert isinstance(spec, Agent)
    assert results.workloads == [spec.model_dump(mode="json")]
    turns = [turn for talk in spec.talks for turn in talk.lengths(0)]
    written = sum(answer for *_, answer in turns)
    tokens = sum(isl + place for _, isl, answer in turns for place in range(1, answer))
    facts = results.engines["bf16"].model_dump()
    cache, rate = tokens * facts["shape"]["cache"] * 2, facts["rates"]["bandwidth"]
    page, readme = ((ROOT / name).read_text("utf-8").replace("\n", " ") for name in ("docs/bench.md", "README.md"))
    assert (
        f"the {written:,} tokens that are written read {cache / 1e12:.1f} TB of KV cache, "
        f"which take {cache / rate:.1f} s at the {rate / 1e12:.2f} TB/s of a copy"
    ) in page
    (row,) = (row for row in results.rows if (row.arm, row.session) == ("bf16", 0))
    assert row.median
    assert f"[{1e5 * cache / rate / row.median:.0f} % of BF16's time at least]" in readme


def test_what_is_not_known_has_no_ceiling() -> None:
    *_, beside_a_prompt = Decode().cases()
    assert bound_ms(beside_a_prompt, BF16, SHAPE, RATES) is None
    (int8,) = chosen(["bf16"], ["x=int8"], "int8")[1:]
    assert bound_ms(prompt(1000), int8, SHAPE, RATES) is None
    assert bound_ms(prompt(1000), BF16, SHAPE, Rates(gemm=RATES.gemm, attention={}, bandwidth=1)) is None


def test_a_row_gets_the_share_that_is_reached() -> None:
    facts = {
        "shape": SHAPE.to_dict(),
        "rates": {"gemm": dict(RATES.gemm), "attention": {"1000": 1e12}, "bandwidth": 1e12},
        "kernels": {"prefill": ["vllm.bf16"], "decode": ["vllm.bf16"]},
    }
    found = beside(row("bf16", [4040.0]), prompt(1000), BF16, facts)
    assert found.ceiling_ms == pytest.approx(2020)
    assert found.ceiling_share == pytest.approx(0.5)
    assert beside(row("bf16", [4040.0]), prompt(1000), BF16, {}).ceiling_share is None
    facts |= {"kernels": {"prefill": ["vllm.cutlass_fp8"], "decode": ["mixquant.nested"]}, "min_prompt": 1000}
    assert beside(row("phase", [4040.0]), prompt(1000), PHASE, facts).ceiling_ms == pytest.approx(1021.5)
    facts["min_prompt"] = 1001
    assert beside(row("phase", [4040.0]), prompt(1000), PHASE, facts).ceiling_ms == pytest.approx(2020)
