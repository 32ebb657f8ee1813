"""Servers as arms: small HTTP servers that misbehave. A real one is in tests/commands/test_served.py."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mixquant.checkpoint.locate import find
from mixquant.commands import evaluate as evaluation
from mixquant.errors import InputError
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.integrations import openai as servers
from mixquant.integrations.openai import ServerBackend, api_messages, parse_servers
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.policy import CONTROL

pytest.importorskip("openai")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(find("demo"))


# Servers that misbehave

Reply = tuple[int, str]
"""Status, and body; JSON where it looks like it."""


def listing(*names: str) -> Reply:
    return 200, json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


def answer(text: str = "12 + 3", model: str = "m", finish: str = "stop") -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "text": text, "finish_reason": finish}
    return 200, json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": model, "choices": [choice]})


@dataclass
class Small:
    """An HTTP server on loopback: `models` replies to GET, `reply` (given how many came before) to each POST."""

    reply: Callable[[int], Reply] = lambda count: answer()
    models: Reply = field(default_factory=lambda: listing("m"))
    seen: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def post(self, body: Mapping[str, Any]) -> Reply:
        with self.lock:
            count = len(self.seen)
            self.seen.append(dict(body))
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            return self.reply(count)
        finally:
            with self.lock:
                self.running -= 1


@contextmanager
def serving(small: Small) -> Iterator[str]:
    """The base URL of a small server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send(*small.models)

        def do_POST(self) -> None:
            self.send(*small.post(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def send(self, status: int, body: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if body[:1] in "{[" else "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *args: object) -> None:  # a client that hung up
            pass

    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def ask(
    small: Small,
    tokenizer: PreTrainedTokenizerBase,
    count: int = 1,
    arm: str = "phase",
    timeout: float = 60,
    model: str = "m",
) -> list[TokenIds]:
    """What an arm on this server answers to `count` chats."""
    with (
        serving(small) as url,
        closing(ServerBackend({arm: url}, model, tokenizer, timeout=timeout).open(arm)) as engine,
    ):
        return engine.generate([Query([{"role": "user", "content": str(i)}], [1], 9) for i in range(count)])


def slowly(count: int) -> Reply:
    time.sleep(0.05)
    return answer()


def test_requests_are_greedy_and_limited_and_answers_end_as_they_did(tokenizer: PreTrainedTokenizerBase) -> None:
    small = Small(lambda count: answer(finish=("stop", "length")[count]))
    with serving(small) as url, closing(ServerBackend({"phase": url + "/"}, "m", tokenizer).open("phase")) as engine:
        (chat,) = engine.generate([Query([{"role": "user", "content": "9"}], [1], 9)])
        (text,) = engine.generate([Query("9 +", [1], 9)], drafts=[[4, 5]])
    assert text == tokenizer("12 + 3", add_special_tokens=False).input_ids
    assert chat == [*text, tokenizer.eos_token_id]
    shared = {"model": "m", "temperature": 0.0, "max_tokens": 9}
    assert small.seen == [{"messages": [{"role": "user", "content": "9"}], **shared}, {"prompt": "9 +", **shared}]


def test_nothing_is_claimed_of_a_server(tokenizer: PreTrainedTokenizerBase) -> None:
    backend = ServerBackend({"bf16": "http://127.0.0.1:1/v1"}, "m", tokenizer)
    assert not backend.forces
    with serving(Small()) as url:
        engine = ServerBackend({"bf16": url}, "m", tokenizer).open("bf16")
        assert engine.kernels == {"prefill": [], "decode": []}
        with pytest.raises(InputError, match="A server cannot force tokens: use --engine"):
            engine.score([], [])
        engine.close()


@pytest.mark.parametrize(("arm", "most"), [("phase", servers.CONCURRENCY), (CONTROL, servers.CONCURRENCY // 2)])
def test_requests_run_together_and_not_too_many(tokenizer: PreTrainedTokenizerBase, arm: str, most: int) -> None:
    small = Small(slowly)
    assert len(ask(small, tokenizer, 3 * servers.CONCURRENCY, arm)) == 3 * servers.CONCURRENCY
    assert 1 < small.most <= most
    assert {body["messages"][0]["content"] for body in small.seen} == {str(i) for i in range(3 * servers.CONCURRENCY)}


def test_a_server_that_recovers_loses_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    small = Small(lambda count: answer() if count >= servers.ATTEMPTS - 1 else (503, '{"error": "loading"}'))
    assert len(ask(small, tokenizer)) == 1
    assert len(small.seen) == servers.ATTEMPTS


def test_after_a_failure_the_rest_is_not_sent(tokenizer: PreTrainedTokenizerBase) -> None:
    small = Small(lambda count: slowly(count) if count else (400, '{"error": {"message": "too long"}}'))
    with pytest.raises(InputError, match="refuses a request"):
        ask(small, tokenizer, 20 * servers.CONCURRENCY)
    assert len(small.seen) < 10 * servers.CONCURRENCY


@contextmanager
def hanging() -> Iterator[str]:
    """The base URL of a server that takes every connection and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def test_a_server_that_hangs_has_had_its_time(tokenizer: PreTrainedTokenizerBase) -> None:
    held = threading.Event()
    small = Small(lambda count: answer(str(held.wait(30))))
    with pytest.raises(InputError, match=r"gave no answer within 0.3 s: see its log, and restart it\.$"):
        ask(small, tokenizer, timeout=0.3)
    assert (len(small.seen), small.running) == (1, 1)  # the server still holds the only attempt
    held.set()


def test_attempts_share_one_time(tokenizer: PreTrainedTokenizerBase) -> None:
    """The first fails, and the second hangs for what is left."""
    held = threading.Event()
    small = Small(lambda count: answer(str(held.wait(30))) if count else (503, '{"error": "loading"}'))
    with pytest.raises(InputError, match=r"gave no answer within 2 s"):
        ask(small, tokenizer, timeout=2)
    assert (len(small.seen), small.running) == (2, 1)  # the server still holds the second
    held.set()


def test_a_server_that_does_not_say_what_it_serves(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "PATIENCE", 0.3)
    with hanging() as url, pytest.raises(InputError, match=r"gave no answer within 0.3 s: see its log, and restart"):
        ServerBackend({"phase": url}, "m", tokenizer).identify()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (lambda count: (500, '{"error": {"message": "out of memory"}}'), "fails .*500.*: see its log, and"),
        (lambda count: (401, '{"error": {"message": "who"}}'), "refuses the key .*: set OPENAI_API_KEY"),
        (lambda count: (404, "<html>"), "has no such page .*404.*: name a base URL such as http"),
        (lambda count: (200, "<html>"), "does not speak the OpenAI API: name a base URL such as http"),
        (lambda count: (200, '{"choices"'), "does not speak the OpenAI API"),
        (lambda count: (200, "[1]"), "does not speak the OpenAI API"),
        (lambda count: (200, '{"model": "m", "choices": []}'), "does not speak the OpenAI API"),
        (lambda count: (200, '{"model": "m", "choices": [{"finish_reason": "stop"}]}'), "does not speak the OpenAI"),
        (lambda count: answer(model=f"m{count}"), "answered as m0, not as m: let it serve one model for a whole run"),
    ],
    ids=["500", "key", "404", "html", "half a JSON", "list", "no choice", "no message", "another model"],
)
def test_faults_are_one_sentence(tokenizer: PreTrainedTokenizerBase, reply: Callable[[int], Reply], words: str) -> None:
    with pytest.raises(InputError, match=f"^The server of the arm phase at http://127[^ ]+ {words}") as raised:
        ask(Small(reply), tokenizer)
    assert "\n" not in str(raised.value)


def test_a_model_that_changes_in_the_middle_is_noticed(tokenizer: PreTrainedTokenizerBase) -> None:
    small = Small(lambda count: answer(model="m" if count < 5 else "m2"))
    with pytest.raises(InputError, match="answered as m2, not as m"):
        ask(small, tokenizer, 10)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        (listing("a", "b"), "serves a, b, and not m as asked: start it with --served-model-name m, or say which"),
        (listing("x/m", "y/m"), "serves x/m, y/m, and not m as asked"),
        (listing("M"), "serves M, and not m as asked"),
        (listing(), "serves no model, and not m as asked"),
        ((500, '{"error": {"message": "loading"}}'), "fails .*500: .*: see its log, and restart it"),
        ((200, "<html>"), "does not speak the OpenAI API"),
        ((200, '{"status": "ok"}'), "does not speak the OpenAI API"),
        ((404, '{"detail": "Not Found"}'), "has no such page"),
    ],
)
def test_what_a_server_says_it_serves(tokenizer: PreTrainedTokenizerBase, models: Reply, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ask(Small(models=models), tokenizer)


@pytest.mark.parametrize(
    ("served", "model"),
    [("m", "m"), ("org/m", "/models/m/"), ("/models/m", "org/m"), ("m", "./m"), ("org/m", "m")],
)
def test_a_name_is_the_same_wherever_the_model_lies(
    tokenizer: PreTrainedTokenizerBase, served: str, model: str
) -> None:
    small = Small(lambda count: answer(model=served), models=listing("other", served))
    assert len(ask(small, tokenizer, model=model)) == 1
    assert small.seen[0]["model"] == served


def test_all_arms_serve_the_model_that_was_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with serving(Small(models=listing("x/a"))) as one, serving(Small(models=listing("b"))) as other:
        backend = ServerBackend({"bf16": one, "phase": other}, "a", tokenizer)
        backend.open("bf16").close()
        with pytest.raises(InputError, match=r"arm phase at .* serves b, and not a as asked: start it with --served-"):
            backend.identify()
        with pytest.raises(InputError, match="arm uniform has no server: add --server uniform=URL"):
            backend.open("uniform")
        named = ServerBackend({"bf16": one}, "x/a", tokenizer).identify()
        assert named == {"bf16": {"url": one, "model": "x/a"}}


def test_a_server_that_is_not_there(tokenizer: PreTrainedTokenizerBase) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=r"cannot be reached \(.*refused\): start it, or correct its URL"):
            ServerBackend({"phase": url}, "m", tokenizer).open("phase")


def test_without_the_client_the_extra_is_named(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"openai is not installed: pip install 'mixquant\[eval\]'"):
        ServerBackend({}, "m", tokenizer)


# What users write


def test_servers_by_arm() -> None:
    given = ["phase=http://host:8000/v1/", "bf16-control=https://[::1]:9/x?key=a=b"]
    assert parse_servers(given) == {"phase": "http://host:8000/v1", "bf16-control": "https://[::1]:9/x?key=a=b"}
    assert parse_servers([]) == {}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["http://host:8000/v1"], "'http://host:8000/v1' names no server: write ARM=URL, such as phase=http"),
        (["phase=host:8000"], "'phase=host:8000' names no server: write ARM=URL"),
        (["phase="], "names no server"),
        (["phases=http://host:1/v1"], "Unknown arm 'phases': did you mean phase"),
        (
            ["phase=http://a/v1", "phase=http://b/v1"],
            "arm phase has two servers, http://a/v1 and http://b/v1: name one",
        ),
    ],
)
def test_servers_that_are_none(given: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_servers(given)


def test_messages_for_templates_become_messages_for_the_api() -> None:
    call = {"type": "function", "function": {"name": "read", "arguments": {"page": 1}}}
    user = {"role": "user", "content": "go"}
    chat = [user, {"role": "assistant", "tool_calls": [call, call]}, *[{"role": "tool", "content": "x"}] * 2]
    before = json.dumps(chat)
    made = api_messages(chat)
    calls = made[1]["tool_calls"]
    assert [call["function"] for call in calls] == [{"name": "read", "arguments": '{"page": 1}'}] * 2
    assert [message["tool_call_id"] for message in made[2:]] == [call["id"] for call in calls]
    assert calls[0]["id"] != calls[1]["id"]
    assert made[0] == user
    assert json.dumps(chat) == before
    assert api_messages(made) == made


# A run on servers


def test_servers_belong_to_the_run(tmp_path: Path) -> None:
    """URL and served name are in the results, and neither another server nor another name continues the run."""
    tasks = tmp_path / "mine.jsonl"
    tasks.write_text('{"prompt": "12 + 3?", "answer": "12 + 3", "checker": "exact", "max_tokens": 9}\n')
    output = tmp_path / "results.json"

    def run(url: str, name: str | None = None) -> dict[str, Any]:
        settings = evaluation.Settings(
            model="demo", arms=["bf16", "phase"], tasks=[str(tasks)], servers={"bf16": url, "phase": url},
            served_model_name=name,
        )  # fmt: skip
        return evaluation.evaluate(settings, output, "command").to_dict()

    def small(name: str) -> Small:
        return Small(lambda count: answer(model=name), models=listing(name))

    with serving(small("demo")) as url:
        results = run(url)
        assert results["servers"] == {arm: {"url": url, "model": "demo"} for arm in ("bf16", "phase")}
        assert json.loads(output.read_text())["servers"] == results["servers"]
        assert run(url)["arms"] == results["arms"]
    with serving(small("demo")) as url, pytest.raises(InputError, match=r"belongs to another run \(servers was"):
        run(url)
    with serving(small("other")) as url:
        with pytest.raises(InputError, match="serves other, and not demo as asked"):
            run(url)
        with pytest.raises(InputError, match=r"belongs to another run \(servers was"):
            run(url, "other")
