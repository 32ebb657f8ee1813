"""A first hand-over between each prefill and each decode server, before clients come.

NIXL's handshake takes place at the first request of two servers. A network that does not let it through, or a prefill
server that is too busy to answer it in five seconds, would otherwise be found by a client, while all servers are
healthy. What a router does is done by hand: a prefill server reads a prompt and says where its KV is, a decode server
fetches it and answers.
"""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from http import HTTPStatus
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from mixquant.errors import InputError
from mixquant.integrations.vllm import pair

PROMPT = "The first of many prompts."
ATTEMPTS = 3
TIMEOUT_SECONDS = 120

WANTED: Mapping[str, Any] = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
    "remote_host": None, "remote_port": None,
}  # fmt: skip
"""What asks a prefill server to keep a prompt's KV, and to say where it is."""


def try_all(prefill: Iterable[str], decode: Iterable[str], model: str, options: Sequence[str] = ()) -> None:
    """Raise InputError for the first two servers, by their URLs, between which a hand-over fails. options: the
    servers', which may hold their key."""
    writers = list(decode)
    for reader in prefill:
        for writer in writers:
            _try(reader, writer, model, api_key(options))


def api_key(options: Sequence[str]) -> str | None:
    """The key that servers ask for; vLLM's option comes before its variable."""
    for place, option in enumerate(options):
        if option == "--api-key" and place + 1 < len(options):
            return options[place + 1]
        if option.startswith("--api-key="):
            return option.partition("=")[2]
    return os.environ.get("VLLM_API_KEY")


def _try(prefill: str, decode: str, model: str, key: str | None) -> None:
    for attempts_left in reversed(range(ATTEMPTS)):
        kept: Mapping[str, Any] | None = None
        try:
            kept = _complete(prefill, model, key, WANTED)["kv_transfer_params"]
            _complete(decode, model, key, kept)
        except (OSError, KeyError, ValueError) as error:
            if not attempts_left or _is_final(error):
                raise InputError(_sentence(prefill, decode, kept, error)) from None
        else:
            return


def _is_final(error: Exception) -> bool:
    """Whether trying again is in vain, or would take as long as this has."""
    unauthorized = isinstance(error, HTTPError) and error.code == HTTPStatus.UNAUTHORIZED
    return unauthorized or isinstance(getattr(error, "reason", error), TimeoutError)


def _sentence(prefill: str, decode: str, kept: Mapping[str, Any] | None, error: Exception) -> str:
    """Why no KV went over, and what to do. kept: what the prefill server has said of its KV, if it got so far."""
    if isinstance(error, HTTPError) and error.code == HTTPStatus.UNAUTHORIZED:
        return f"{decode if kept else prefill} asks for a key: set VLLM_API_KEY, or pass it by -- --api-key KEY."
    if not kept:
        return f"The first prompt that {prefill} was asked to read failed ({error}): look at its log."
    failed = f"The first hand-over of KV from {prefill} to {decode} failed"
    if pair.is_loopback(kept["remote_host"]) and not pair.is_loopback(urlsplit(decode).hostname or ""):
        return (
            f"{failed}: the prefill server listens at {kept['remote_host']}, where another machine cannot reach it. "
            "Start it with --host and its machine's address."
        )
    host = f"[{kept['remote_host']}]" if ":" in kept["remote_host"] else kept["remote_host"]
    return (
        f"{failed} ({error}): look at both logs, and let the decode server's machine reach NIXL at "
        f"{host}:{kept['remote_port']} and UCX at any port of the prefill server's machine (or at those of its "
        "UCX_TCP_PORT_RANGE)."
    )


def _complete(url: str, model: str, key: str | None, transfer: Mapping[str, Any]) -> dict[str, Any]:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": 1, "kv_transfer_params": transfer}
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        found: dict[str, Any] = json.load(answer)
        return found
