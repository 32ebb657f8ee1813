"""Prompt files and chats, and the token ids that a model reads.

One reader for every command, which takes chats as OpenAI's API and vLLM do (`vllm.renderers.chat_utils`, 0.32):

    [{"role": ..., "content": ...}, ...]  or  {"messages": [...], "tools": [...]}
    content      text, or parts of type text, which are joined by newlines
    arguments    of a tool call: an object, or the JSON text of one; templates get the object
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mixquant.devices import memory_limit
from mixquant.errors import InputError
from mixquant.files import parse_json, read_text, reading


class Tokenizer(Protocol):
    """What we use of a tokenizer; those of Transformers have it. Only `integrations` may import their classes."""

    chat_template: Any
    eos_token_id: int | None

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True) -> Any:
        """An object whose `input_ids` are a text's ids, or a list of them for each of several texts."""

    def __len__(self) -> int:
        """Tokens of the vocabulary, added ones included."""

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
    ) -> Any:
        """A chat as text, or as ids with `tokenize`. A template is a program: it raises what it likes."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each sequence of ids."""


Message = dict[str, Any]


@dataclass(frozen=True)
class Chat:
    """Messages as chat templates take them, and the tools that they may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


Prompt = str | list[Message] | Chat

NO_TEMPLATE = "The model has no chat template: give plain text, or a tokenizer with a template."
_MEND = "mend it, or give plain text"

TEMPLATE_BYTES = 256 << 20
"""What a template may take while it writes."""

TEMPLATE_WRITES, TEMPLATE_REPEATS = 1 << 20, 10
"""Characters that a template may write of its own, and how often it may say what the chat says: tokenizers take a
hundred times the memory of their text."""


def plain(messages: Sequence[Message]) -> str:
    """A chat in words alone, for models without a chat template; calls in JSON, and the assistant's turn begun."""
    turns = [(message["role"].title(), message["content"] or _made(message)) for message in messages]
    return "".join(f"{role}: {said}\n\n" for role, said in turns) + "Assistant: "


def _made(message: Message) -> str:
    return json.dumps([call["function"] for call in message["tool_calls"]]) if "tool_calls" in message else ""


def read_prompt(path: Path) -> str | Chat:
    """A prompt file: `.json` holds a chat, anything else is text as it stands, as is stdin, by the path `-`.

    InputError for what is neither.
    """
    text = _read_stdin() if path == Path("-") else read_text(path, "name a prompt file")
    if not text:
        raise InputError("The prompt is empty: give at least one token.")
    return parse_chat(parse_json(text, path, "give a chat"), path) if path.suffix == ".json" else text


def _read_stdin() -> str:
    with reading(Path("stdin"), "send UTF-8 text"):
        return sys.stdin.buffer.read().decode("utf-8-sig")


def parse_chat(document: Any, where: str | Path) -> Chat:
    """A chat from outside, checked. Raises InputError, which names the place by `where`."""
    messages, tools = document, None
    if isinstance(document, dict):
        messages, tools = document.get("messages"), document.get("tools")
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where} holds no chat: give [{{"role": "user", "content": "..."}}, ...].')
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise InputError(f'{where} has tools that are no list of objects: give [{{"type": "function", ...}}, ...].')
    parsed = [_message(message, f"message {number} of {where}") for number, message in enumerate(messages, start=1)]
    return Chat(parsed, tools or None)


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f'{where} holds no chat message: give {{"role": "user", "content": "..."}}.')
    calls, content = message.get("tool_calls"), message.get("content")
    if content is None and not calls:
        raise InputError(f"{where} has neither content nor tool calls: mend or remove it.")
    parsed = message | {"content": _text(content, where)}
    if calls:
        parsed["tool_calls"] = _calls(calls, where)
    return parsed


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise InputError(f"{where} has content that is neither text nor a list of parts: give text.")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise InputError(f"{where} has a part of type {kind}: mixquant reads text alone.")
    return "\n".join(part["text"] for part in parts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(
        isinstance(c, dict) and isinstance(c.get("function"), dict) for c in calls
    ):
        raise InputError(f'{where} has tool calls that are no functions: give [{{"function": {{"name": ...}}}}, ...].')
    return [call | {"function": call["function"] | {"arguments": _arguments(call, where)}} for call in calls]


def _arguments(call: dict[str, Any], where: str) -> Any:
    given = call["function"].get("arguments") or {}
    value = (
        parse_json(given, f"A tool call's arguments in {where}", "give an object") if isinstance(given, str) else given
    )
    if not isinstance(value, dict):
        raise InputError(f"{where} has tool call arguments that are no object: give an object, or its JSON text.")
    return value


def encode(tokenizer: Tokenizer, prompt: Prompt) -> Tensor:
    """Token ids [1, n] of a text or, through the chat template, of a chat."""
    return torch.tensor([token_ids(tokenizer, prompt)])


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The same as a list, which long runs prefer: Transformers is slow at making tensors."""
    return batch_token_ids(tokenizer, [prompt])[0]


def batch_token_ids(tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The same for many prompts at once: tokenizers read a list of texts on all cores. InputError for an empty one."""
    found: list[list[int]] = [[] for _ in prompts]
    for is_text in (True, False):  # a chat's template writes the special tokens, a text gets the tokenizer's
        places = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str) is is_text]
        texts = [_as_text(tokenizer, prompts[i]) for i in places]
        if not all(map(encodes, texts)):
            raise InputError(
                "The prompt holds half a character (a lone \\ud800 or the like), which is no text: mend it."
            )
        encoded = tokenizer(texts, add_special_tokens=is_text).input_ids if texts else []
        for i, ids in zip(places, encoded, strict=True):
            found[i] = ids
    if not all(found):
        raise InputError("The prompt is empty: give at least one token.")
    return found


def encodes(text: str) -> bool:
    """Whether UTF-8 can say it: JSON may escape half a character, and a command line hold bytes that are none; no
    tokenizer reads those."""
    try:
        return text.encode() is not None
    except UnicodeEncodeError:
        return False


def _as_text(tokenizer: Tokenizer, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return render(tokenizer, as_chat(prompt), "These messages", add_generation_prompt=True)


def as_chat(prompt: list[Message] | Chat) -> Chat:
    """Messages as a chat that has no tools."""
    return prompt if isinstance(prompt, Chat) else Chat(prompt)


def render(
    tokenizer: Tokenizer,
    chat: Chat,
    where: str,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """A chat through the tokenizer's template. InputError where there is none, where it refuses the chat, and where it
    takes more memory, or writes more, than any prompt: templates are programs, and come with models of anybody's.
    """
    if tokenizer.chat_template is None:
        raise InputError(NO_TEMPLATE)
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    try:
        with memory_limit(TEMPLATE_BYTES):
            text = str(tokenizer.apply_chat_template(chat.messages, chat.tools, tokenize=False, **options))
    except MemoryError:
        raise InputError(f"{where}: the chat template takes more than {TEMPLATE_BYTES >> 20} MiB: {_MEND}.") from None
    except Exception as error:  # they raise what they like
        raise InputError(f"{where}: the chat template refuses it ({error}): {_MEND}.") from None
    if len(text) > TEMPLATE_WRITES + TEMPLATE_REPEATS * len(str(chat)):
        raise InputError(f"{where}: the chat template makes a text of {len(text):,} characters of it: {_MEND}.")
    return text
