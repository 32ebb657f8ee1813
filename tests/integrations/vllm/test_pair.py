"""What the servers of a pair must agree on: said by real configurations, and compared before the first request."""

from __future__ import annotations

import copy
import json
import os
import shutil
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mixquant.checkpoint.locate import DEMO, Found, find
from mixquant.errors import InputError
from mixquant.integrations.vllm import facts, pair
from mixquant.phase import WHOLE_PROMPT
from mixquant.policy import METHOD, TAIL, Policy
from tests.folders import name_decode_model, write_quantized
from tests.integrations.vllm.engines import engine_config

POLICY = Policy(prefill="nvfp4", role="prefill", storage="separate")


def config(
    role: str = "prefill",
    found: Found | None = None,
    policy: Policy = POLICY,
    own: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The configuration of a server of a pair, which is not started. own: a decode server's policy, None for stock."""
    from vllm.config import KVTransferConfig

    found = found or find("demo")
    _, connector, *_ = pair.connector_options(role, policy, found)
    fields = policy.to_dict() if role == "prefill" else own
    transfer = KVTransferConfig(**json.loads(connector))
    return engine_config(Path(found.decode), fields, kv_transfer_config=transfer, **options)


def compatibility(config: Any) -> str:
    """What NIXL compares at the first handshake."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import metadata

    from mixquant.integrations.vllm.nixl import renamed

    return str(metadata.compute_nixl_compatibility_hash(renamed(config), "CPU_ATTN"))


def said(config: Any) -> facts.Facts:
    return facts.of(config, Namespace(chat_template=None, served_model_name=["demo"]))


@pytest.fixture(scope="module")
def prefill() -> Any:
    return config()


def test_both_sides_of_a_pair_say_the_same(prefill: Any, tmp_path: Path) -> None:
    """Stock BF16 and our plugin; wherever the model lies."""
    moved = find(shutil.copytree(DEMO, tmp_path / "elsewhere"))
    for decode in (config("decode"), config("decode", moved)):
        assert decode.quant_config is None
        assert prefill.quant_config.policy == POLICY
        facts.compare({"http://a": said(prefill), "http://b": said(decode)})
        assert compatibility(prefill) == compatibility(decode)


def test_a_decode_server_with_nested_weights_is_one_of_the_pair() -> None:
    """How it stores its weights is its own affair: they are the same to the last bit
    (test_nested.test_decode_is_stock_vllms_to_the_last_bit, whose policy this is)."""
    given = {"prefill": "nvfp4", "storage": "nested"}
    own = pair.decode_policy(given)
    assert own == Policy(prefill="fp8", storage="nested", tail=WHOLE_PROMPT, min_prompt=0).to_dict()
    policy = pair.prefill_policy(given, find("demo"))
    assert policy == POLICY
    bf16 = {"dtype": "bfloat16"}
    prefill, decode = config(policy=policy, **bf16), config("decode", policy=policy, own=own, **bf16)
    assert decode.quant_config.policy.storage == "nested"
    facts.compare({"http://a": said(prefill), "http://b": said(decode)})
    assert compatibility(prefill) == compatibility(decode)
    for stock in ({"prefill": "nvfp4"}, {"prefill": "nvfp4", "storage": "auto"}):
        assert pair.decode_policy(stock) is None


def test_kv_of_two_precisions_or_models_never_meets(prefill: Any, tmp_path: Path) -> None:
    """NIXL refuses the handshake, whoever skipped the comparison; stock vLLM's own hash would pass most of these."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import metadata

    other = find(shutil.copytree(DEMO, tmp_path / "other"))
    tokenizer = tmp_path / "other/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    different = [
        config("decode", policy=replace(POLICY, prefill="int8")),
        config("decode", policy=replace(POLICY, scales="amax")),
        config("decode", other),
    ]
    hashes = {compatibility(found) for found in [prefill, *different]}
    assert len(hashes) == 4
    stock = {metadata.compute_nixl_compatibility_hash(found, "CPU_ATTN") for found in [prefill, *different[:2]]}
    assert len(stock) == 1


def test_how_a_failed_hand_over_ends_is_no_matter_of_vllms_default(prefill: Any) -> None:
    """An error, and not a prompt that the decode server reads in BF16."""
    assert prefill.kv_transfer_config.kv_load_failure_policy == "fail"
    assert said(prefill).failure_policy == "fail"


def test_an_expired_hand_over_is_sent_nowhere() -> None:
    """Later than the lease, whose end the prefill server has said; in time, or without a hand-over, nothing changes."""
    from mixquant.integrations.vllm import nixl

    kept, given = nixl._dated((True, {"do_remote_prefill": True, "remote_engine_id": "a", "remote_port": 5600}))
    assert kept
    assert given is not None
    late = dict(given)
    nixl.send_nowhere_if_expired(late, given[nixl.EXPIRES] + 1)
    assert late == given | nixl.NOBODY
    for parameters in (given, given | {"do_remote_prefill": False}, {"do_remote_prefill": True}, None):
        before = copy.copy(parameters)
        moment = given[nixl.EXPIRES] + (0 if parameters is given else 99)
        nixl.send_nowhere_if_expired(parameters, moment)
        assert parameters == before


def test_a_server_that_others_cannot_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "")  # so that it is taken back at the end
    monkeypatch.delenv("VLLM_NIXL_SIDE_CHANNEL_HOST")
    for options in ([], ["--host", "0.0.0.0"], ["--host", "::"], ["--host", "0:0:0:0:0:0:0:0"], ["--host", ""]):
        with pytest.raises(InputError, match=r"name its address, such as --host 10\.0\.0\.1"):
            pair.announce_address(options)
    for host in ("127.0.0.1", "10.0.0.1", "fd00::1", "reads.example.org"):
        monkeypatch.delenv("VLLM_NIXL_SIDE_CHANNEL_HOST", raising=False)
        pair.announce_address(["--host", host])
        assert os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] == host


@pytest.mark.parametrize("announced", ["0.0.0.0", "::", "127.0.0.1", "::1", "localhost"])
def test_an_address_that_others_cannot_reach_is_not_announced(announced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's variable; on one machine a loopback is in order."""
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", announced)
    with pytest.raises(InputError, match=r"are told, .* leave it out, and NIXL listens at 10\.0\.0\.1"):
        pair.announce_address(["--host", "10.0.0.1"])
    if not pair.is_wildcard(announced):
        pair.announce_address(["--host", "127.0.0.1"])


def test_a_connection_that_hangs_ends_before_a_lease(prefill: Any) -> None:
    """Set for UCX wherever a server of a pair is configured."""
    from mixquant.integrations.vllm.nixl import LEASE_SECONDS, MARGIN_SECONDS

    assert int(os.environ["UCX_TCP_USER_TIMEOUT"].removesuffix("s")) < LEASE_SECONDS - MARGIN_SECONDS


def test_a_connector_without_a_pair_is_refused(prefill: Any) -> None:
    from mixquant.integrations.vllm.nixl import renamed

    alone = copy.copy(prefill)
    alone.kv_transfer_config = copy.copy(prefill.kv_transfer_config)
    alone.kv_transfer_config.kv_connector_extra_config = {}
    with pytest.raises(InputError, match=r"belongs to a pair: start both sides by .*--role prefill"):
        renamed(alone)
    assert METHOD in prefill.kv_transfer_config.kv_connector_extra_config


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dtype": "bfloat16"}, r"the model's dtype: float32 at http://a \(prefill\), bfloat16 at http://b \(decode\)"),
        ({"block_size": 64}, "the KV cache's block size: 32 at .* pass the same --block-size to both"),
        ({"kv_cache_dtype": "fp8"}, "the KV cache's dtype: float32 at .*, fp8 at .* the same --kv-cache-dtype to both"),
        ({"max_model_len": 256}, "the longest context: 512 at .*, 256 at .* the same --max-model-len to both"),
    ],
)
def test_an_option_in_which_servers_differ_is_named(prefill: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        facts.compare({"http://a": said(prefill), "http://b": said(config("decode", **options))})


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vllm": "0.31.0"}, r"differ in vLLM: .* 0\.31\.0 at .*: install one version on both"),
        ({"connector": "NixlConnector 13"}, "the NIXL connector's version"),
        ({"model": "f" * 64}, r"the BF16 model's hash: .*, ffffffffffffffff\.\.\. at http://b"),
        ({"tokenizer": "0"}, "the tokenizer's hash: .*: serve folders with the same tokenizer and chat template"),
        ({"chat_template": "a.jinja"}, "--chat-template: None at .*, a.jinja at .*: pass the same one to both"),
        ({"served_as": ["other"]}, "the served model name: demo at .*, other at"),
        ({"policy": "mixquant-0"}, "the prefill policy: .* pass the same --prefill"),
        ({"layers": 2}, "the number of layers: 8 at .*, 2 at"),
        ({"kv_heads": 2}, "the number of KV heads"),
        ({"head_size": 2}, "the size of a head"),
        ({"tensor_parallel": 2}, "tensor parallelism: 1 at .*, 2 at .* the same --tensor-parallel-size to both"),
        ({"failure_policy": "recompute"}, "kv_load_failure_policy: fail at .*, recompute at"),
    ],
)
def test_a_fact_in_which_servers_differ_is_named(prefill: Any, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        facts.compare({"http://a": said(prefill), "http://b": replace(said(prefill), role="decode", **changes)})


def test_every_fact_but_the_role_is_compared() -> None:
    assert set(facts.SAID) == {field.name for field in fields(facts.Facts)} - {"role"}


@pytest.mark.parametrize("tail", [4, TAIL])
def test_a_policy_that_keeps_a_tail_cannot_be_a_pairs(tail: int) -> None:
    with pytest.raises(InputError, match=f"decode=bf16, tail={tail} cannot be"):
        pair.prefill_policy({"tail": tail}, find("demo"))


def test_a_pairs_tail_is_1_whatever_the_folder_was_made_for(tmp_path: Path) -> None:
    """Nobody has asked for the tail that stands in mixquant.json."""
    assert pair.prefill_policy({"prefill": "fp8"}, find("demo")).tail == 1
    folder = write_quantized(DEMO, tmp_path / "q", scales="amax")
    for made_for in ({"prefill": "nvfp4"}, {"prefill": "nvfp4", "tail": 4}):
        name_decode_model(folder, DEMO, made_for)
        assert pair.prefill_policy({}, find(folder)) == POLICY


@pytest.mark.parametrize("option", ["--kv-transfer-config", "--quantization=fp8", "-dp"])
def test_options_that_a_pair_sets_itself_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"A pair sets {option.partition('=')[0]} itself: leave it out"):
        pair.check_options(["--dtype", "float32", option])
