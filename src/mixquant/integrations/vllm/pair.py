"""A pair: prefill servers read prompts in a quantized format, decode servers write answers in BF16.

    prefill    our plugin under role=prefill: the quantized weights alone; every row goes through them
    decode     stock vLLM on the BF16 model, or our plugin with nested weights, which are the same in 12 bits; it pulls
               a prompt's KV, and computes the last prompt token itself

The tokens are those of one engine with tail=1, min_prompt=0 and storage=separate. KV moves by vLLM's NIXL connector
(`nixl`), which here lets only servers of one identity meet. Each server also says at GET /mixquant what it is
(`facts`), so that what does not fit is found before the first request.

A hand-over that fails is an error of that request (kv_load_failure_policy=fail), which its client may send again. With
vLLM's other choice, `recompute`, the decode server would read the prompt in BF16: other tokens than asked for, and the
work of a prefill server where nobody planned it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mixquant.checkpoint.locate import Found
from mixquant.checkpoint.sidecar import fingerprint
from mixquant.errors import InputError
from mixquant.phase import WHOLE_PROMPT
from mixquant.policy import BY_ROLE, METHOD, Policy

ROLES = ("prefill", "decode")

FAILURE_POLICY = "fail"

SIDE_CHANNEL_HOST = "VLLM_NIXL_SIDE_CHANNEL_HOST"
"""The variable with the address that vLLM tells other servers, and listens at for NIXL's handshakes."""

UCX_TCP_USER_TIMEOUT = "10s"
"""How long TCP sends KV again that nobody acknowledges. By itself it would try for a quarter of an hour, and a request
whose KV was on its way when a link failed would wait as long; after this it is an error."""

PATH = "/mixquant"
"""Where a server of a pair says what it is."""

CONNECTOR = {
    "kv_connector": "NixlConnector",
    "kv_connector_module_path": "mixquant.integrations.vllm.nixl",
    "kv_load_failure_policy": FAILURE_POLICY,
}
KV_ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}

OWN = ("--kv-transfer-config", "--quantization", "-q", "--headless", "--data-parallel-size", "-dp")
"""vLLM's options that a pair sets itself, or cannot serve."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", "tekken.json",
)  # fmt: skip
"""Whatever of a model's files decides which tokens a chat becomes: both sides read it, each by its own files."""


def prefill_policy(policy: Mapping[str, Any], found: Found) -> Policy:
    """The policy of the prefill side, from the fields that were given, or else from what a quantized folder says, but
    for the tail that it was made for: a pair's is 1. How decode servers store their weights is no part of it, and
    `storage=auto` would be another policy on another GPU."""
    given = {key: value for key, value in policy.items() if key != "storage"}
    if found.sidecar and not given:
        return replace(found.sidecar.policy, role="prefill", tail=BY_ROLE, storage="separate")
    return Policy.parse({**given, "role": "prefill", "storage": "separate"})


def decode_policy(policy: Mapping[str, Any]) -> dict[str, Any] | None:
    """The policy of a decode server, None for stock vLLM. Nested, it computes every token in BF16 too, those of a
    prompt that it is asked to read itself among them."""
    if Policy.parse(policy).storage != "nested":
        return None
    return Policy(prefill="fp8", storage="nested", tail=WHOLE_PROMPT, min_prompt=0).to_dict()


def check_options(options: Sequence[str]) -> None:
    """Raise InputError for one of vLLM's options that a pair sets itself."""
    for option in options:
        if option.partition("=")[0] in OWN:
            raise InputError(f"A pair sets {option.partition('=')[0]} itself: leave it out.")


def announce_address(options: Sequence[str]) -> None:
    """Let NIXL be reached where HTTP is. Raises InputError where that is no address that others can know."""
    host = options[options.index("--host") + 1] if "--host" in options else ""
    if is_wildcard(host):
        raise InputError(
            "The other servers of a pair fetch KV from this one: name its address, such as --host 10.0.0.1, or --host "
            "127.0.0.1 on one machine."
        )
    announced = os.environ.setdefault(SIDE_CHANNEL_HOST, host)
    if is_wildcard(announced) or (is_loopback(announced) and not is_loopback(host)):
        raise InputError(
            f"{SIDE_CHANNEL_HOST}={announced} is what the other servers of a pair are told, and they cannot reach this "
            f"one there: leave it out, and NIXL listens at {host}."
        )


def is_wildcard(host: str) -> bool:
    """Whether a server that listens at this address listens everywhere."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return host in ("", "*")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches itself there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def connector_options(role: str, policy: Policy, found: Found) -> list[str]:
    """vLLM's options that make a server one of a pair."""
    from vllm.platforms import current_platform

    config: dict[str, Any] = CONNECTOR | {
        "kv_role": KV_ROLES[role],
        "kv_connector_extra_config": {METHOD: identity(policy, found)},
    }
    options = ["--middleware", "mixquant.integrations.vllm.facts.Middleware"]
    os.environ.setdefault("UCX_TCP_USER_TIMEOUT", UCX_TCP_USER_TIMEOUT)
    if current_platform.is_cpu():
        config["kv_buffer_device"] = "cpu"
        # One process: NIXL's thread polls without a pause, and on a CPU that it fills, vLLM's engine and worker miss
        # each other's messages for seconds, long enough for a hand-over to expire.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        options += ["--distributed-executor-backend", "uni"]
    return ["--kv-transfer-config", json.dumps(config), *options]


def identity(policy: Policy, found: Found) -> dict[str, Any]:
    """What both sides of a pair agree on: the model, its tokenizer, and how the prefill side makes KV."""
    from vllm.platforms import current_platform

    from mixquant.integrations.vllm.checkpoint import resolve
    from mixquant.integrations.vllm.stores import salt

    folder = found.download()
    return {
        "model": fingerprint(folder),
        "revision": found.revision,
        "tokenizer": tokenizer_hash(folder),
        "policy": salt(resolve(found, policy, None), current_platform.get_device_name()),
    }


def tokenizer_hash(folder: Path) -> str:
    """SHA-256 over the files that decide which tokens a chat becomes."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()
