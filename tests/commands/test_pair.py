"""A pair on the loopback: it answers as one engine does, and whatever fails, nobody gets a wrong token or waits.

64 requests, 16 at a time, token by token. Prompts make no sense to the model, so that it is in doubt and quantization
shows. As everywhere, one FP4 code that flips by rounding may move the log-probabilities of one request in eight.

Faults are real: processes are killed. A client then gets an error, or a stream that ends without a finish_reason; it
asks again, and once the process is back, it gets the tokens that it got before.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mixquant.checkpoint.locate import DEMO
from mixquant.errors import InputError
from mixquant.integrations.vllm import facts
from mixquant.integrations.vllm import pair as pair_
from tests import pairs
from tests.commandline import refuse
from tests.integrations.vllm.engines import CONTROL, EXACT
from tests.pairs import POLICY, Answer, Pair
from tests.servers import free_port

pytest.importorskip("vllm")
pytest.importorskip("nixl")
pytest.importorskip("vllm_router")

REQUESTS = 64
CLIENTS = 16
NEW_TOKENS = 8
ENDLESS = 2000
"""Tokens of an answer during which something happens."""
LONG = 600
"""Words of a prompt that is read in several steps."""
RETRY_SECONDS = 30
WORDS = ("Sort", "qty", "Follow", "next", "times", "Report", "Checksum", "records", "along", "Move", "to", "number")


def words(random: Random, count: int) -> str:
    picked = random.choices(WORDS, k=count)
    return " ".join(str(random.randrange(1000)) if word == "number" else word for word in picked)


SHARED = words(Random(99), 40)
"""What every second prompt starts with: several blocks that the prefix caches of both sides can share."""

PROMPTS = [f"{SHARED if index % 2 else ''} {words(Random(index), 10 + index)}".strip() for index in range(REQUESTS)]


def ask_all(pair: Pair, prompts: list[str]) -> list[Answer]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(lambda prompt: pair.ask(prompt, NEW_TOKENS), prompts))


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


def difference(one: Answer, other: Answer) -> float:
    return max(abs(p - q) for p, q in zip(one.logprobs, other.logprobs, strict=True))


def check(ours: list[Answer], expected: list[Answer]) -> None:
    assert {answer.error for answer in ours} == {""}
    assert [answer.tokens for answer in ours] == [answer.tokens for answer in expected]
    flips = [found for found in map(difference, ours, expected) if found > EXACT]
    assert len(flips) <= len(ours) // 8, flips


@pytest.mark.slow
@pytest.mark.parametrize("policy", [{"prefill": "bf16"}, POLICY | {"tail": 0}], ids=["bf16", "tail=0"])
def test_control_other_policies_give_other_answers(policy: dict[str, Any], expected: list[Answer]) -> None:
    """Nothing quantized; and the last prompt token quantized too, which a pair does not do."""
    found = single_engine(policy)
    assert sum(one.tokens != other.tokens for one, other in zip(found, expected, strict=True)) > REQUESTS // 8
    assert min(difference(one, other) for one, other in zip(found, expected, strict=True)) > CONTROL


@pytest.fixture(scope="class")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pairs.running(tmp_path_factory.mktemp("pair"), *request.cls.options) as pair:
        yield pair


class TestWithPrefixCaches:
    options = ()

    def test_a_pair_answers_as_one_engine(self, pair: Pair, expected: list[Answer]) -> None:
        """The first time the caches fill, the second time they answer."""
        check(ask_all(pair, PROMPTS), expected)
        check(ask_all(pair, PROMPTS[:CLIENTS]), expected[:CLIENTS])

    def test_servers_say_what_they_are(self, pair: Pair) -> None:
        prefill, decode = (facts.ask(pair.server(f"{role} server 1")) for role in pair_.ROLES)
        assert (prefill.role, decode.role) == pair_.ROLES
        assert replace(decode, role="prefill") == prefill
        assert "mixquant policy: prefill=nvfp4, decode=bf16, tail=1, " in pair.log("prefill-1")
        assert ", role=prefill" in pair.log("prefill-1")
        assert "mixquant policy" not in pair.log("decode-1")
        with pytest.raises(InputError, match="is no server of a pair"):
            facts.ask(pair.url)

    def test_a_router_of_its_own_before_servers_that_run(self, pair: Pair, expected: list[Answer]) -> None:
        """As on several machines; the roles are asked for, not believed."""
        prefill, decode = (pair.server(f"{role} server 1") for role in pair_.ROLES)
        with pairs.router(prefill, decode) as router:
            check(ask_all(router, PROMPTS[:CLIENTS]), expected[:CLIENTS])
        swapped = ("--role", "router", "--prefill-url", decode, "--decode-url", prefill)
        assert f"{decode} is a decode server: name it by --decode-url." in refuse("serve", "demo", *swapped)
        named = ("--role", "router", "--prefill-url", prefill, "--decode-url", decode)
        assert f"{prefill} serves demo and not other: name that." in refuse("serve", "other", *named)

    def test_a_prefill_server_of_another_precision_is_refused(self, pair: Pair, tmp_path: Path) -> None:
        """By the comparison; and, where that is skipped, by the decode server at the handshake."""
        decode = pair.server("decode server 1")
        with pairs.prefill_server(tmp_path / "log", "--prefill", "fp8") as other:
            servers = ("--prefill-url", other, "--prefill-url", pair.server("prefill server 1"), "--decode-url", decode)
            sentence = refuse("serve", "demo", "--role", "router", *servers)
            assert "Two servers of the pair differ in the prefill policy" in sentence

            def refused() -> bool:
                """A busy machine may answer the handshake too late, which is an error too."""
                answer = pairs.hand_over(other, decode, PROMPTS[0], NEW_TOKENS)
                assert (answer.status, answer.tokens) == (500, [])
                return "NIXL compatibility hash mismatch" in pair.log("decode-1")

            pairs.wait_for(refused)


class TestWithoutPrefixCachesAndFaults:
    options = ("--no-enable-prefix-caching",)

    def test_a_pair_answers_as_one_engine(self, pair: Pair, expected: list[Answer]) -> None:
        check(ask_all(pair, PROMPTS), expected)

    def test_a_client_that_leaves_disturbs_nobody(self, pair: Pair, expected: list[Answer]) -> None:
        for _ in range(4):
            with pair.stream(PROMPTS[0], ENDLESS) as pieces:
                next(pieces)
        assert pair.ask(PROMPTS[1], NEW_TOKENS).tokens == expected[1].tokens

    def test_a_hand_over_that_fails_is_an_error_and_no_bf16_answer(self, pair: Pair, expected: list[Answer]) -> None:
        """The decode server is told of a prefill server that does not exist. Alone it would read the prompt in BF16."""
        decode = replace(pair, url=pair.server("decode server 1"))
        gone = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "nobody", "tp_size": 1}
        gone |= {"remote_host": "127.0.0.1", "remote_port": free_port(), "remote_block_ids": [[1]]}
        answer = decode.ask(PROMPTS[1], NEW_TOKENS, kv_transfer_params=gone | {"remote_request_id": "none"})
        assert (answer.status, answer.tokens) == (500, [])
        assert "due to KV load failure (failure_policy=fail" in pair.log("decode-1")
        alone = decode.ask(PROMPTS[1], NEW_TOKENS)  # the control
        assert difference(alone, expected[1]) > CONTROL
        assert pair.ask(PROMPTS[1], NEW_TOKENS).tokens == expected[1].tokens

    def test_the_router_is_killed(self, pair: Pair, expected: list[Answer]) -> None:
        with pair.stream(PROMPTS[2], ENDLESS) as pieces:
            next(pieces)
            pair.kill("router")
            assert not ends_well(pieces)
        recovers(pair, expected)

    def test_servers_are_killed(self, pair: Pair, expected: list[Answer]) -> None:
        """All prefill servers while one reads: an error, and no decode server reads that prompt, or the next, in BF16.
        Then a decode server while it writes, which the end of its prefill server did not disturb: vLLM's router ends
        the stream as if it were complete, and only the finish_reason is missing."""
        with ThreadPoolExecutor(1) as pool, pair.stream(PROMPTS[2], ENDLESS) as pieces:
            next(pieces)
            before = pair.log("prefill-1").count("/render")
            asked = pool.submit(pair.ask, words(Random(1), LONG), NEW_TOKENS)
            pairs.wait_for(lambda: pair.log("prefill-1").count("/render") > before)  # the router asks for it first
            pair.kill("prefill server 1")
            assert asked.result().status == 500
            assert pair.ask(PROMPTS[3], NEW_TOKENS).status in (500, 503)
            assert next(pieces)
            pair.kill("decode server 1")
            assert not ends_well(pieces)
        recovers(pair, expected)


def ends_well(pieces: Iterator[dict[str, Any]]) -> bool:
    """Whether a stream comes to its finish_reason."""
    try:
        return any(piece["choices"][0]["finish_reason"] for piece in pieces)
    except OSError:
        return False


def recovers(pair: Pair, expected: list[Answer]) -> None:
    """Asked again and again, a pair answers with an error until it answers right; it never makes anybody wait."""

    def answered() -> bool:
        answer = pair.try_again(PROMPTS[3], NEW_TOKENS, timeout=RETRY_SECONDS)
        assert answer is None or answer.status in (500, 503) or answer.tokens == expected[3].tokens
        return answer is not None and answer.status == 200

    pairs.wait_for(answered)
    assert pair.ask(PROMPTS[4], NEW_TOKENS).tokens == expected[4].tokens
    assert "starts again." in pair.said.read_text()
