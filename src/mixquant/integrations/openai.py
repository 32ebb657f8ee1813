"""Any OpenAI-compatible server as an arm, for tasks and free runs.

    mixquant eval MODEL --server bf16=http://localhost:8000/v1 --server phase=http://localhost:8001/v1

Chats go to /v1/chat/completions, texts to /v1/completions, greedily and some at a time. A server gives text, where the
evaluator counts in tokens: they are the text's own encoding, with an end-of-turn token where the server says that the
model stopped by itself. What a server keeps apart from the answer (`reasoning_content`) is not part of it.

A server forces no tokens, so these arms have no teacher-forced divergence, and says nothing of its kernels. What can be
checked is: it must serve a model of the name that was asked for, or of its last part (Qwen3-8B of Qwen/Qwen3-8B or of a
folder), and answer in this name to the end. URL and name belong to the run: another server does not continue it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from torch import Tensor

from mixquant.errors import InputError
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.packages import require
from mixquant.policy import ARMS, CONTROL, choose_name
from mixquant.prompts import Message, as_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONCURRENCY = 16
"""Requests on their way to a server at a time; half as many for `bf16-control`, so that its batches differ."""

ATTEMPTS = 3
"""How often a request is sent before a server that fails or is gone ends the run; one that hangs has had its time."""

TIMEOUT = 600.0
"""Seconds for an answer, all attempts together; nothing arrives before it is complete."""

PATIENCE = 10.0
"""Seconds to connect, and to say what is served."""


def parse_servers(values: Sequence[str]) -> dict[str, str]:
    """Base URLs by arm, from ARM=URL each; InputError for another form, an unknown arm or one named twice."""
    servers: dict[str, str] = {}
    for value in values:
        arm, _, url = value.partition("=")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise InputError(f"{value!r} names no server: write ARM=URL, such as phase=http://localhost:8000/v1.")
        if choose_name("arm", arm, ARMS) in servers:
            raise InputError(f"The arm {arm} has two servers, {servers[arm]} and {url}: name one.")
        servers[arm] = url.rstrip("/")
    return servers


class ServerBackend:
    """Servers by arm.

    model: what all of them serve, under this name or its last part. tokenizer: the model's, for token ids. timeout:
    seconds for one answer. The key is OPENAI_API_KEY's.
    """

    name = "openai"
    device = "unknown"
    together = True
    forces = False

    def __init__(
        self,
        servers: Mapping[str, str],
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        timeout: float = TIMEOUT,
    ) -> None:
        require("openai")
        self.servers = servers
        self.model = model
        self.tokenizer = tokenizer
        self.api_key = os.environ.get("OPENAI_API_KEY") or "none"
        self.timeout = timeout

    def open(self, arm: str) -> ServerEngine:
        """Connect to an arm's server; InputError where none is named, none answers, or it serves another model."""
        if arm not in self.servers:
            raise InputError(f"The arm {arm} has no server: add --server {arm}=URL.")
        server = Server(arm, self.servers[arm], self.api_key, self.timeout)
        served = server.choose(self.model)
        return ServerEngine(server, served, self.tokenizer, CONCURRENCY // 2 if arm == CONTROL else CONCURRENCY)

    def identify(self) -> dict[str, dict[str, str]]:
        """What runs, by arm: URL and name of the model. InputError as `open`."""
        found = {}
        for arm, url in self.servers.items():
            with closing(self.open(arm)) as engine:
                found[arm] = {"url": url, "model": engine.model}
        return found


class ServerEngine:
    """One arm's server. Its kernels are unknown: `kernels` is empty, and `emulated` says that none is known to be."""

    def __init__(self, server: Server, model: str, tokenizer: PreTrainedTokenizerBase, concurrency: int) -> None:
        self.kernels: dict[str, list[str]] = {"prefill": [], "decode": []}
        self.emulated = False
        self.server = server
        self.model = model
        self.tokenizer = tokenizer
        self.concurrency = concurrency

    def generate(self, queries: Sequence[Query], drafts: Sequence[TokenIds] | None = None) -> list[TokenIds]:
        """As `Engine.generate`; drafts are not used."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(self._answer, queries))  # after an error, map cancels what has not begun

    def score(self, queries: Sequence[Query], answers: Sequence[TokenIds]) -> list[Tensor]:
        raise InputError("A server cannot force tokens: use --engine transformers or vllm for divergences.")

    def close(self) -> None:
        self.server.client.close()

    def _answer(self, query: Query) -> TokenIds:
        text, stopped = self.server.complete(self.model, query)
        ids: TokenIds = self.tokenizer(text, add_special_tokens=False).input_ids
        ends = stopped and self.tokenizer.eos_token_id is not None
        return [*ids, self.tokenizer.eos_token_id] if ends else ids


class Server:
    """The OpenAI API at a URL, with everything that can go wrong said in one sentence."""

    def __init__(self, arm: str, url: str, api_key: str, timeout: float) -> None:
        import openai

        self.name = f"The server of the arm {arm} at {url}"
        self.timeout = timeout
        self.client = openai.OpenAI(base_url=url, api_key=api_key, max_retries=0)

    def choose(self, model: str) -> str:
        """The name to ask for: that of the one served model which is called `model`, or by its last part."""
        with self._talk(PATIENCE):
            served = [str(card.id) for card in self.client.models.list(timeout=PATIENCE).data]
        same = [name for name in served if name == model] or [name for name in served if _last(name) == _last(model)]
        if len(same) != 1:
            raise InputError(
                f"{self.name} serves {', '.join(served) or 'no model'}, and not {model} as asked: start it with "
                f"--served-model-name {_last(model)}, or say which one is meant by --served-model-name here."
            )
        return same[0]

    def complete(self, model: str, query: Query) -> tuple[str, bool]:
        """The greedy answer's text, and whether the model ended it itself."""
        options: dict[str, Any] = {"model": model, "temperature": 0.0, "max_tokens": query.limit}
        if isinstance(query.prompt, str):
            ask: Any = partial(self.client.completions.create, prompt=query.prompt)
        else:
            chat = as_chat(query.prompt)
            tools = {"tools": chat.tools} if chat.tools else {}
            ask = partial(self.client.chat.completions.create, messages=api_messages(chat.messages), **tools)
        with self._talk(self.timeout):
            answer = self._persist(partial(ask, **options))
            choice = answer.choices[0]
            text = choice.text if isinstance(query.prompt, str) else said(choice.message)
            name, stopped = answer.model, choice.finish_reason in ("stop", "tool_calls")
        if name != model:
            raise InputError(f"{self.name} answered as {name}, not as {model}: let it serve one model for a whole run.")
        return text, stopped

    def _persist(self, ask: Callable[..., Any]) -> Any:
        """Ask until there is an answer, as long as attempts and time last."""
        import openai

        deadline = time.monotonic() + self.timeout
        for attempt in range(1, ATTEMPTS + 1):
            left = max(deadline - time.monotonic(), 0.001)
            try:
                return ask(timeout=openai.Timeout(left, connect=min(left, PATIENCE)))
            except openai.APITimeoutError:
                raise
            except (openai.InternalServerError, openai.RateLimitError, openai.APIConnectionError):
                if attempt == ATTEMPTS or time.monotonic() + attempt > deadline:
                    raise
                time.sleep(attempt / 2)
        return None  # never: the last attempt returns or raises

    @contextmanager
    def _talk(self, seconds: float) -> Iterator[None]:
        """Say in a sentence what goes wrong in a request, or while its answer is read."""
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            self._refuse(error)
        except openai.APITimeoutError:
            raise InputError(f"{self.name} gave no answer within {seconds:g} s: see its log, and restart it.") from None
        except openai.APIConnectionError as error:
            raise InputError(
                f"{self.name} cannot be reached ({error.__cause__ or error}): start it, or correct its URL."
            ) from None
        except (ValueError, TypeError, LookupError, AttributeError):  # no JSON, or not what the API says it is
            raise InputError(
                f"{self.name} does not speak the OpenAI API: name a base URL such as {_EXAMPLE}."
            ) from None

    def _refuse(self, error: Any) -> NoReturn:
        """The sentence for an HTTP status that is none of success."""
        status = error.status_code
        said = f"{status}: {str(error.message).splitlines()[0]}"
        if status == 404:
            raise InputError(f"{self.name} has no such page ({said}): name a base URL such as {_EXAMPLE}.") from None
        if status in (401, 403):
            raise InputError(f"{self.name} refuses the key ({said}): set OPENAI_API_KEY.") from None
        if status >= 500:
            raise InputError(f"{self.name} fails ({said}): see its log, and restart it.") from None
        raise InputError(f"{self.name} refuses a request ({said}): check its context length and options.") from None


_EXAMPLE = "http://localhost:8000/v1"


def _last(name: str) -> str:
    """What a model is called, without the place where it lies."""
    return PurePosixPath(name).name


def said(message: Any) -> str:
    """A message's text, and below it the calls that the server took out of it, as JSON."""
    found = [call.function for call in message.tool_calls or ()]
    written = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in found]
    return "\n".join([*([message.content] if message.content else []), *written])


def api_messages(messages: Sequence[Message]) -> list[Message]:
    """Chat messages as the API wants them: tool calls have ids and their arguments as JSON text, results name a call.

    Chat templates need neither, so that messages made for them may lack both.
    """
    made: list[Message] = []
    open_calls: list[str] = []
    for place, message in enumerate(messages):
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_api_call(call, f"call-{place}-{i}") for i, call in enumerate(calls)]
            open_calls = [call["id"] for call in message["tool_calls"]]
        elif message["role"] == "tool" and open_calls:
            message.setdefault("tool_call_id", open_calls[0])
            open_calls = open_calls[1:]
        made.append(message)
    return made


def _api_call(call: Message, id: str) -> Message:
    function = dict(call["function"])
    if not isinstance(function["arguments"], str):
        function["arguments"] = json.dumps(function["arguments"])
    return {"id": id, "type": "function", **call, "function": function}
