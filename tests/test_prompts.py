"""One reader of prompts and chats for all commands: what vLLM takes, in the form that chat templates take."""

from __future__ import annotations

import json
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mixquant import prompts
from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.prompts import Chat, Tokenizer, parse_chat, read_prompt, render, token_ids

TOOLS = [{"type": "function", "function": {"name": "lookup_flight", "parameters": {"type": "object"}}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "lookup_flight", "arguments": '{"city": "Oslo"}'}}
CHAT = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "When does the next plane"}, {"type": "text", "text": "go?"}],
    },
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "17:40"},
]
PARSED = {"name": "lookup_flight", "arguments": {"city": "Oslo"}}

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(find("demo"))
    found.chat_template = TEMPLATE
    return found


def test_an_openai_chat_keeps_its_tools_and_arguments(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"messages": CHAT, "tools": TOOLS}))
    chat = read_prompt(path)
    assert isinstance(chat, Chat)
    assert chat.tools == TOOLS
    assert chat.messages[0]["content"] == "When does the next plane\ngo?"
    assert chat.messages[1]["content"] == ""
    assert chat.messages[1]["tool_calls"][0]["function"] == PARSED
    text = tokenizer.decode(token_ids(tokenizer, chat))
    assert "lookup_flight" in text.split("<user>")[0]
    assert "<call>city=Oslo" in text
    assert text.endswith("<assistant>")
    without = tokenizer.decode(token_ids(tokenizer, Chat(chat.messages)))
    assert "<tools>" not in without


def test_a_list_of_messages_and_arguments_as_an_object_are_the_same(tokenizer: Tokenizer) -> None:
    given = json.loads(json.dumps(CHAT))
    given[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo"}
    assert parse_chat(given, "here") == parse_chat({"messages": CHAT}, "there")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text, chat = tmp_path / "a.txt", tmp_path / "b.json"
    text.write_text("hello", encoding="utf-8-sig")
    chat.write_text(json.dumps(CHAT), encoding="utf-8-sig")
    assert read_prompt(text) == "hello"
    assert read_prompt(chat) == parse_chat(CHAT, chat)


def test_text_that_looks_like_json_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(json.dumps(CHAT))
    assert read_prompt(tmp_path / "a.txt") == json.dumps(CHAT)


def changed(**fields: Any) -> list[dict[str, Any]]:
    return [CHAT[0], CHAT[1] | fields]


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"a": 1}, "here holds no chat: give"),
        ([], "here holds no chat"),
        ("text", "here holds no chat"),
        ({"messages": CHAT, "tools": {"a": 1}}, "here has tools that are no list"),
        ([CHAT[0], 5], "message 2 of here holds no chat message"),
        ([{"role": 5, "content": "x"}], "message 1 of here holds no chat message"),
        ([{"role": "user"}], "message 1 of here has neither content nor tool calls"),
        ([{"role": "user", "content": 3}], "content that is neither text nor a list"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "a part of type image_url: mixquant reads text alone"),
        ([{"role": "user", "content": ["x"]}], "a part of type str"),
        (changed(tool_calls=[5]), "tool calls that are no functions"),
        (changed(tool_calls={"a": 1}), "tool calls that are no functions"),
        (changed(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "arguments in message 2 of here is not"),
        (changed(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "arguments that are no object"),
        (changed(tool_calls=[{"function": {"name": "f", "arguments": "[" * 99_999}}]), "nested too deeply|not valid"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_place(document: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_chat(document, "here")


def test_templates_that_refuse_or_are_missing(tokenizer: Tokenizer) -> None:
    chat = parse_chat(CHAT, "here")
    refusing = load_tokenizer(find("demo"))
    refusing.chat_template = "{{ raise_exception('no tools') }}"
    with pytest.raises(InputError, match=r"the chat template refuses it .*no tools.*: mend it, or give plain text"):
        token_ids(refusing, chat)
    refusing.chat_template = None
    with pytest.raises(InputError, match="The model has no chat template: give plain text"):
        token_ids(refusing, chat)


GREEDY = {
    "times": "{{ 'x' * 10**10 }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "doubling": "{% set s = namespace(t='x') %}{% for i in range(40) %}{% set s.t = s.t ~ s.t %}{% endfor %}{{ s.t }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "filter": "{{ 'x' | center(10000000000) }}",
    "list": "{{ ([0] * 10**10) | length }}",
    "squared": "{% set s = 'x' * 10**6 %}{{ s | replace('x', s) }}",
}


@pytest.mark.parametrize("template", GREEDY.values(), ids=GREEDY)
def test_a_template_that_takes_memory_is_stopped(template: str) -> None:
    greedy = load_tokenizer(find("demo"))
    greedy.chat_template = template
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(InputError, match="here: the chat template takes more than 256 MiB: mend it, or give plain"):
        render(greedy, parse_chat(CHAT, "here"), "here")
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    greedy.chat_template = TEMPLATE
    assert "Oslo" in render(greedy, parse_chat(CHAT, "here"), "here")


def test_a_template_may_write_much_but_no_more_than_tokenizers_bear(tokenizer: Tokenizer) -> None:
    wordy = load_tokenizer(find("demo"))
    wordy.chat_template = "{{ messages[0].content }}{{ 'x' * 10**6 }}"
    assert len(render(wordy, Chat([{"role": "user", "content": "y" * 10**6}]), "here")) == 2 * 10**6
    wordy.chat_template = "{{ 'x' * 10**7 }}"
    with pytest.raises(InputError, match="makes a text of 10,000,000 characters of it: mend it"):
        render(wordy, Chat([{"role": "user", "content": "y"}]), "here")


def peak() -> int:
    """Most bytes that this process has held. `getrusage` would count those of the process that started it too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def grown(limit: int) -> tuple[int, str]:
    """Bytes that rendering half a gigabyte adds to the peak of a process of its own, and what it says."""
    greedy = load_tokenizer(find("demo"))
    greedy.chat_template = "{{ 'x' * (5 * 10**8) }}"
    prompts.TEMPLATE_BYTES = limit
    before = peak()
    with pytest.raises(InputError) as refused:
        render(greedy, parse_chat(CHAT, "here"), "here")
    return peak() - before, str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [prompts.TEMPLATE_BYTES, 2 << 30], ids=["stopped", "control"])
def test_a_stopped_template_has_taken_no_memory(limit: int) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        more, sentence = pool.submit(grown, limit).result()
    if limit == prompts.TEMPLATE_BYTES:
        assert more < 300 << 20
        assert "takes more than 256 MiB" in sentence
    else:
        assert more > 400 << 20
        assert "500,000,000 characters" in sentence
