"""What the servers of a pair must agree on, told by each at GET /mixquant and compared before the first request.

NIXL compares some of it too, but at the first request, by one hash that does not say what differs, while every
server's /health is green. The rest would not be found at all: a prompt that two tokenizers cut in two ways.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

from mixquant.errors import InputError
from mixquant.integrations.vllm.pair import PATH
from mixquant.policy import METHOD

AsgiMessage = MutableMapping[str, Any]
Send = Callable[[AsgiMessage], Awaitable[None]]
Receive = Callable[[], Awaitable[AsgiMessage]]
Application = Callable[[AsgiMessage, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one server is. All but its role must be the same on all servers of a pair."""

    role: str
    vllm: str
    connector: str
    model: str
    revision: str | None
    tokenizer: str
    chat_template: str | None
    served_as: list[str]
    policy: str
    dtype: str
    kv_cache_dtype: str
    block_size: int
    layers: int
    kv_heads: int
    head_size: int
    tensor_parallel: int
    max_model_len: int
    failure_policy: str


SAID = {
    "vllm": ("vLLM", "install one version on both"),
    "connector": ("the NIXL connector's version", "install one version of vLLM on both"),
    "model": ("the BF16 model's hash", "serve the same weights on both"),
    "revision": ("the model's revision", "serve the same revision on both"),
    "tokenizer": ("the tokenizer's hash", "serve folders with the same tokenizer and chat template"),
    "chat_template": ("--chat-template", "pass the same one to both"),
    "served_as": ("the served model name", "pass the same --served-model-name to both"),
    "policy": (
        "the prefill policy",
        "pass the same --prefill to both, by name where devices differ, with one version of mixquant",
    ),
    "dtype": ("the model's dtype", "pass the same --dtype to both"),
    "kv_cache_dtype": ("the KV cache's dtype", "pass the same --kv-cache-dtype to both"),
    "block_size": ("the KV cache's block size", "pass the same --block-size to both"),
    "layers": ("the number of layers", "serve the same model on both"),
    "kv_heads": ("the number of KV heads", "serve the same model on both"),
    "head_size": ("the size of a head", "serve the same model on both"),
    "tensor_parallel": ("tensor parallelism", "pass the same --tensor-parallel-size to both"),
    "max_model_len": ("the longest context", "pass the same --max-model-len to both"),
    "failure_policy": ("kv_load_failure_policy", "start both by mixquant serve"),
}
"""What each fact is called, and what to do where two differ; in the order in which they are compared."""


def compare(servers: Mapping[str, Facts]) -> None:
    """Raise InputError for the first fact in which a server, by its URL, differs from the first one."""
    (first, expected), *others = servers.items()
    for name, (words, remedy) in SAID.items():
        for url, facts in others:
            one, other = getattr(expected, name), getattr(facts, name)
            if one != other:
                raise InputError(
                    f"Two servers of the pair differ in {words}: {_short(one)} at {first} ({expected.role}), "
                    f"{_short(other)} at {url} ({facts.role}): {remedy}."
                )


def _short(value: object) -> str:
    """A value as a sentence shows it: of a hash, the first digits."""
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return text if len(text) < 40 else f"{text[:16]}..."


def ask(url: str) -> Facts:
    """What the server at this URL is. Raises InputError where none answers, or one that is no part of a pair."""
    try:
        with urllib.request.urlopen(url + PATH, timeout=30) as answer:
            return Facts(**json.load(answer))
    except urllib.error.URLError as error:
        if not isinstance(error, urllib.error.HTTPError):
            raise InputError(f"No server answers at {url} ({error.reason}): start it, or check the address.") from None
        raise _no_part(url) from None
    except (TypeError, ValueError):
        raise _no_part(url) from None


def _no_part(url: str) -> InputError:
    return InputError(
        f"{url} is no server of a pair, or of another version of mixquant: start it by `mixquant serve MODEL --role "
        "prefill` or `--role decode`."
    )


def of(config: Any, arguments: Any) -> Facts:
    """The facts of a server by its VllmConfig, and the command line that it was started with."""
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NIXL_CONNECTOR_VERSION

    model, cache, transfer = config.model_config, config.cache_config, config.kv_transfer_config
    own = transfer.kv_connector_extra_config[METHOD]
    dtype = str(model.dtype).removeprefix("torch.")
    return Facts(
        role="prefill" if transfer.kv_role == "kv_producer" else "decode",
        vllm=vllm.__version__,
        connector=f"{transfer.kv_connector} {NIXL_CONNECTOR_VERSION}",
        chat_template=arguments.chat_template and str(arguments.chat_template),
        served_as=list(arguments.served_model_name),
        dtype=dtype,
        kv_cache_dtype=dtype if cache.cache_dtype == "auto" else cache.cache_dtype,
        block_size=cache.block_size,
        layers=model.get_total_num_hidden_layers(),
        kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        tensor_parallel=config.parallel_config.tensor_parallel_size,
        max_model_len=model.max_model_len,
        failure_policy=transfer.kv_load_failure_policy,
        **own,
    )


class Middleware:
    """Answers GET /mixquant; vLLM adds it by --middleware. Everything else passes through."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: AsgiMessage, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        body = json.dumps(asdict(of(state.vllm_config, state.args))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
        await send({"type": "http.response.body", "body": body})
