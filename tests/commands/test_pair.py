"""A pair on the loopback: it answers as one engine does, and whatever fails, nobody gets a wrong token or waits.

64 requests, 16 at a time, token by token. Prompts make no sense to the model, so that it is in doubt and quantization
shows. As everywhere, one FP4 code that flips by rounding may move the log-probabilities of one request in eight.

Faults are real: processes are killed. A client then gets an error, or a stream that ends without a finish_reason; it
asks again, and once the process is back, it gets the tokens that it got before.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mixquant.checkpoint.locate import DEMO, find
from mixquant.errors import InputError
from mixquant.integrations.vllm import facts
from mixquant.integrations.vllm import pair as pair_
from mixquant.policy import Policy
from tests import pairs
from tests.commandline import refuse
from tests.integrations.vllm.engines import CONTROL, EXACT
from tests.pairs import POLICY, Answer, Pair
from tests.servers import free_port
from tests.soak import RETRIABLE, RETRIABLE_STATUS, soak

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
STANDSTILL_SECONDS = 6
CACHE_MIB = 256
DASHBOARD = Path(__file__).parents[2] / "examples/pair-dashboard.json"
WORDS = ("Sort", "qty", "Follow", "next", "times", "Report", "Checksum", "records", "along", "Move", "to", "number")


def words(random: Random, count: int) -> str:
    picked = random.choices(WORDS, k=count)
    return " ".join(str(random.randrange(1000)) if word == "number" else word for word in picked)


SHARED = words(Random(99), 40)
"""What every second prompt starts with: several blocks that the prefix caches of both sides can share."""

PROMPTS = [f"{SHARED if index % 2 else ''} {words(Random(index), 10 + index)}".strip() for index in range(REQUESTS)]


def ask_all(pair: Pair, prompts: list[str], alone: bool = False) -> list[Answer]:
    """alone: no two requests share cached blocks."""

    def ask(place: int) -> Answer:
        return pair.ask(prompts[place], NEW_TOKENS, **({"cache_salt": f"alone {place}"} if alone else {}))

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(ask, range(len(prompts))))


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


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pairs.running(tmp_path_factory.mktemp("pair")) as pair:
        yield pair


@pytest.fixture
def pair(started: Pair) -> Pair:
    """One that answers: what a failed test left broken is no other test's failure."""
    pairs.wait_for(lambda: answers(started) is not None)
    return started


def answers(pair: Pair) -> Answer | None:
    """What a pair answers to a prompt; None where that is an error."""
    answer = pair.try_again(PROMPTS[3], NEW_TOKENS, timeout=RETRY_SECONDS)
    assert answer is None or answer.status in (200, *RETRIABLE_STATUS)
    return answer if answer is not None and answer.status == 200 else None


def test_a_pair_answers_as_one_engine(pair: Pair, expected: list[Answer]) -> None:
    """The first time the prefix caches fill, the second time they answer; then each request has a cache of its own."""
    check(ask_all(pair, PROMPTS), expected)
    before = hits(pair)
    check(ask_all(pair, PROMPTS[:CLIENTS]), expected[:CLIENTS])
    again = hits(pair)
    assert min(again[role] - before[role] for role in pair_.ROLES) > 0
    check(ask_all(pair, PROMPTS, alone=True), expected)
    assert hits(pair) == again


def hits(pair: Pair) -> dict[str, float]:
    """Prompt tokens found in each role's prefix caches."""
    return {role: pair.total("vllm:prefix_cache_hits_total", role=role) for role in pair_.ROLES}


def test_servers_say_what_they_are(pair: Pair) -> None:
    prefill, decode = (facts.ask(pair.server(f"{role} server 1")) for role in pair_.ROLES)
    assert (prefill.role, decode.role) == pair_.ROLES
    assert replace(decode, role="prefill") == prefill
    assert "mixquant policy: prefill=nvfp4, decode=bf16, tail=1, " in pair.log("prefill-1")
    assert ", role=prefill" in pair.log("prefill-1")
    assert "mixquant policy" not in pair.log("decode-1")
    with pytest.raises(InputError, match="is no server of a pair"):
        facts.ask(pair.url)


def test_a_router_of_its_own_before_servers_that_run(pair: Pair, expected: list[Answer]) -> None:
    """As on several machines; the roles are asked for, not believed."""
    prefill, decode = (pair.server(f"{role} server 1") for role in pair_.ROLES)
    with pairs.router(prefill, decode) as router:
        check(ask_all(router, PROMPTS[:CLIENTS]), expected[:CLIENTS])
    swapped = ("--role", "router", "--prefill-url", decode, "--decode-url", prefill)
    assert f"{decode} is a decode server: name it by --decode-url." in refuse("serve", "demo", *swapped)
    named = ("--role", "router", "--prefill-url", prefill, "--decode-url", decode)
    assert f"{prefill} serves demo and not other: name that." in refuse("serve", "other", *named)


@pytest.mark.parametrize("other", [False, True], ids=["same", "other"])
def test_kv_of_another_precision_is_refused(
    pair: Pair, other: bool, expected: list[Answer], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A decode engine in this process, which skipped the comparison, fetches KV from the pair's prefill server: at the
    handshake it finds whether both are of one pair."""
    policy = pair_.prefill_policy({"prefill": "int8" if other else "nvfp4"}, find("demo"))
    where = pairs.read(pair.server("prefill server 1"), PROMPTS[0])
    (found,) = decode_alone(policy, PROMPTS[0], where, monkeypatch)
    if other:
        assert found.outputs[0].finish_reason == "error"
        assert not found.outputs[0].token_ids
    else:
        assert list(found.outputs[0].token_ids) == expected[0].tokens


def decode_alone(policy: Policy, prompt: str, where: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a decode engine answers that believes its prefill servers to run this policy."""
    from vllm.config import KVTransferConfig

    from tests.integrations.vllm import engines

    for name, value in pairs.NETWORK.items():
        monkeypatch.setenv(name, value)
    _, connector, *_ = pair_.connector_options("decode", policy, find("demo"))
    sampling = engines.sampling(NEW_TOKENS)
    sampling.extra_args = {"kv_transfer_params": where}
    options = {"kv_transfer_config": KVTransferConfig(**json.loads(connector)), "skip_tokenizer_init": False}
    with engines.running(DEMO, None, block_size=32, max_model_len=3072, **options) as llm:
        return llm.generate([prompt], sampling, use_tqdm=False)


def test_a_client_that_leaves_disturbs_nobody(pair: Pair, expected: list[Answer]) -> None:
    """While its prompt is read, between the two servers, and while its answer is written."""
    with pytest.raises(TimeoutError):
        pair.ask(words(Random(2), LONG), NEW_TOKENS, timeout=0.1)
    pairs.read(pair.server("prefill server 1"), PROMPTS[5])
    for _ in range(2):
        with pair.stream(PROMPTS[0], ENDLESS) as pieces:
            next(pieces)
    assert pair.ask(PROMPTS[1], NEW_TOKENS).tokens == expected[1].tokens


def test_a_hand_over_that_fails_is_an_error_and_no_bf16_answer(pair: Pair, expected: list[Answer]) -> None:
    """The decode server is told of a prefill server that does not exist. Alone it would read the prompt in BF16. Both
    are counted: the request that failed, and the prompt tokens that a decode server read itself."""
    decode = replace(pair, url=pair.server("decode server 1"))
    gone = {"do_remote_prefill": True, "do_remote_decode": False, "remote_engine_id": "nobody", "tp_size": 1}
    gone |= {"remote_host": "127.0.0.1", "remote_port": free_port(), "remote_block_ids": [[1]]}
    failed, read = failures(pair), own_prompt_tokens(pair)
    answer = decode.ask(PROMPTS[1], NEW_TOKENS, kv_transfer_params=gone | {"remote_request_id": "none"})
    assert (answer.status, answer.tokens) == (500, [])
    assert "due to KV load failure (failure_policy=fail" in pair.log("decode-1")
    assert failures(pair) == failed + 1
    assert own_prompt_tokens(pair) == read
    alone = decode.ask(PROMPTS[1], NEW_TOKENS, cache_salt="alone")  # the control
    assert difference(alone, expected[1]) > CONTROL
    assert own_prompt_tokens(pair) > read + 10
    assert pair.ask(PROMPTS[1], NEW_TOKENS).tokens == expected[1].tokens


def failures(pair: Pair) -> float:
    """Requests of decode servers that ended in an error."""
    return pair.total("vllm:request_success_total", role="decode", finished_reason="error")


def own_prompt_tokens(pair: Pair) -> float:
    """Prompt tokens that decode servers read themselves; none of a hand-over."""
    return pair.total("vllm:prompt_tokens_by_source_total", role="decode", source="local_compute")


def test_a_slow_transfer_ends_in_the_right_tokens(pair: Pair, expected: list[Answer]) -> None:
    """The prefill server stands still when its KV is fetched, and wakes up within the lease."""
    decode, prefill = replace(pair, url=pair.server("decode server 1")), "prefill server 1"
    where = pairs.read(pair.server(prefill), PROMPTS[7])
    with ThreadPoolExecutor(1) as pool:
        pair.kill(prefill, signal.SIGSTOP)
        try:
            asked = pool.submit(decode.ask, PROMPTS[7], NEW_TOKENS, kv_transfer_params=where)
            time.sleep(STANDSTILL_SECONDS)
            assert not asked.done()
        finally:
            pair.kill(prefill, signal.SIGCONT)
        assert asked.result().tokens == expected[7].tokens


def test_every_name_on_the_dashboard_is_a_metric(pair: Pair) -> None:
    """Grafana shows nothing, and says nothing, where a name is wrong; and so are labels and their values."""
    samples = pair.metrics()
    names = {sample.name for sample in samples}
    labels = {(name, value) for sample in samples for name, value in sample.labels.items()}
    expressions = [
        target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]
    ]
    assert len(expressions) > 10
    for expression in expressions:
        used = re.findall(r"\b(?:vllm:|mixquant_|vllm_router_)\w+", expression)
        assert used, expression
        assert set(used) <= names, expression
        assert set(re.findall(r'(\w+)="(\w+)"', expression)) <= labels, expression


def test_a_decode_server_is_killed(pair: Pair, expected: list[Answer]) -> None:
    """While it writes: vLLM's router ends the stream as if it were complete, and only the finish_reason is missing."""
    written, finished = killed_while_it_writes(pair)
    if finished == "length":  # the answer was complete before the signal came
        assert written == ENDLESS
        recovers(pair, expected)
        written, finished = killed_while_it_writes(pair)
    assert 0 < written < ENDLESS
    assert finished is None
    recovers(pair, expected)


def killed_while_it_writes(pair: Pair) -> tuple[int, str | None]:
    """The tokens that a client got of a decode server that is killed after the first, and the finish_reason."""
    victim = pair.child_of("decode server 1").pid
    written, finished = 0, None
    with pair.stream(PROMPTS[2], ENDLESS) as pieces:
        try:
            for piece in pieces:
                if not written:
                    os.killpg(victim, signal.SIGKILL)
                written += len(piece["choices"][0]["token_ids"])
                finished = piece["choices"][0]["finish_reason"]
        except (OSError, HTTPException):  # a connection that broke
            pass
    return written, finished


def test_kv_that_nobody_fetched_is_freed(pair: Pair) -> None:
    """At the end of its lease, which the prefill server counts: that of the client that left between the two."""
    pairs.wait_for(lambda: pair.total("vllm:nixl_num_kv_expired_reqs_total", role="prefill") > 0)
    pairs.wait_for(lambda: pair.total("vllm:num_requests_running") == 0)


def test_all_prefill_servers_are_killed(pair: Pair, expected: list[Answer]) -> None:
    """While one reads: an error, and no decode server reads that prompt, or the next, in BF16; nor one whose KV ended
    with its server. An answer that is being written goes on."""
    decode = replace(pair, url=pair.server("decode server 1"))
    with ThreadPoolExecutor(1) as pool, pair.stream(PROMPTS[2], ENDLESS) as pieces:
        next(pieces)
        where = pairs.read(pair.server("prefill server 1"), PROMPTS[6])
        before = pair.log("prefill-1").count("/render")
        asked = pool.submit(pair.ask, words(Random(1), LONG), NEW_TOKENS)
        pairs.wait_for(lambda: pair.log("prefill-1").count("/render") > before)  # the router asks for it first
        pair.kill("prefill server 1")
        assert asked.result().status == 500
        assert pair.ask(PROMPTS[3], NEW_TOKENS).status in (500, 503)
        assert next(pieces)
    answer = decode.ask(PROMPTS[6], NEW_TOKENS, timeout=RETRY_SECONDS, kv_transfer_params=where)
    assert (answer.status, answer.tokens) == (500, [])
    recovers(pair, expected)


def test_nobody_gets_a_wrong_token_whatever_is_killed(pair: Pair, expected: list[Answer]) -> None:
    """A minute of sixteen clients: a decode server, the router and a prefill server end in turn. The same for longer is
    benchmarks/pair_soak.py."""
    found = soak(pair, PROMPTS, expected, NEW_TOKENS, plan=(5, 25, 35, 60))
    print("\n".join(found.table()))
    assert set(found.outcomes) <= {"right", *RETRIABLE}, found.outcomes
    assert [fault.seen.total() > 0 for fault in found.faults] == [True] * 3
    # In so short a time blocks of the KV cache are still written for the first time.
    assert all(late < 1.05 * early + CACHE_MIB for early, late in found.memory.values()), found.memory
    assert pair.total("mixquant_server_restarts_total", server="router") == 1


def recovers(pair: Pair, expected: list[Answer]) -> None:
    """Asked again and again, a pair answers with an error until it answers right; it never makes anybody wait."""

    def answered() -> bool:
        answer = answers(pair)
        assert answer is None or answer.tokens == expected[3].tokens
        return answer is not None

    pairs.wait_for(answered)
    assert pair.ask(PROMPTS[4], NEW_TOKENS).tokens == expected[4].tokens
    assert "starts again." in pair.said.read_text()
