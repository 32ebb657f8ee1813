"""A pair on the loopback answers as one engine does: 64 requests, 16 at a time, token by token.

Prompts make no sense to the model, so that it is in doubt and quantization shows. As everywhere, one FP4 code that
flips by rounding may move the log-probabilities of one request in eight.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import pytest

from mixquant.checkpoint.locate import DEMO
from tests import pairs
from tests.integrations.vllm.engines import CONTROL, EXACT
from tests.pairs import POLICY, Answer, Pair

pytest.importorskip("vllm")
pytest.importorskip("nixl")
pytest.importorskip("vllm_router")

REQUESTS = 64
CLIENTS = 16
NEW_TOKENS = 8
WORDS = ("Sort", "qty", "Follow", "next", "times", "Report", "Checksum", "records", "along", "Move", "to", "number")


def words(random: Random, count: int) -> str:
    picked = random.choices(WORDS, k=count)
    return " ".join(str(random.randrange(1000)) if word == "number" else word for word in picked)


SHARED = words(Random(99), 40)
"""What every second prompt starts with: several blocks that the prefix caches of both sides can share."""

PROMPTS = [f"{SHARED if index % 2 else ''} {words(Random(index), 10 + index)}".strip() for index in range(REQUESTS)]


def ask_all(pair: Pair) -> list[Answer]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda prompt: pair.ask(prompt, NEW_TOKENS), PROMPTS))


def single_engine(policy: dict[str, Any]) -> list[Answer]:
    """The answers of one engine in this process, without a cache."""
    from tests.integrations.vllm import engines

    sampling = engines.sampling(NEW_TOKENS)
    options = {"max_model_len": 3072, "max_num_batched_tokens": 512, "max_num_seqs": 16}
    with engines.running(DEMO, policy, skip_tokenizer_init=False, enable_prefix_caching=False, **options) as llm:
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
    return [Answer(200, answer.tokens, answer.logprobs) for answer in map(engines.as_answer, outputs)]


@pytest.fixture(scope="module")
def expected() -> list[Answer]:
    return single_engine(POLICY)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pairs.running(tmp_path_factory.mktemp("pair")) as pair:
        yield pair


def difference(one: Answer, other: Answer) -> float:
    return max(abs(p - q) for p, q in zip(one.logprobs, other.logprobs, strict=True))


def check(ours: list[Answer], expected: list[Answer]) -> None:
    assert [answer.error for answer in ours] == [""] * REQUESTS
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in expected]
    flips = [found for found in map(difference, ours, expected) if found > EXACT]
    assert len(flips) <= REQUESTS // 8, flips


def test_a_pair_answers_as_one_engine(pair: Pair, expected: list[Answer]) -> None:
    """With prefix caches: the first time they fill, the second time they answer."""
    check(ask_all(pair), expected)
    check(ask_all(pair), expected)


@pytest.mark.parametrize("policy", [{"prefill": "bf16"}, POLICY | {"tail": 0}], ids=["bf16", "tail=0"])
def test_control_other_policies_give_other_answers(policy: dict[str, Any], expected: list[Answer]) -> None:
    """Nothing quantized; and the last prompt token quantized too, which a pair does not do."""
    found = single_engine(policy)
    assert sum(one.tokens != other.tokens for one, other in zip(found, expected, strict=True)) > REQUESTS // 8
    assert min(difference(one, other) for one, other in zip(found, expected, strict=True)) > CONTROL
