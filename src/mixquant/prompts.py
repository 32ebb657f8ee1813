"""Prompt files and chats, and the token ids that a model reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mixquant.errors import InputError


class Tokenizer(Protocol):
    """What we use of a tokenizer; those of Transformers have it. Only `integrations` may import their classes."""

    chat_template: Any
    eos_token_id: int | None

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True) -> Any:
        """An object whose `input_ids` are a text's ids, or a list of them for each of several texts."""

    def __len__(self) -> int:
        """Tokens of the vocabulary, added ones included."""

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool = False, tokenize: bool = True
    ) -> Any:
        """A chat as text, or as ids with `tokenize`. A template is a program: it raises what it likes."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of ids."""

    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool = False) -> list[str]:
        """The text of each sequence of ids."""


def read_prompt(path: Path) -> str | list[dict[str, Any]]:
    """A prompt file: `.json` holds chat messages, anything else is text as it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a prompt file.") from None
    if not text:
        raise InputError("The prompt is empty: give at least one token.")
    return _messages(path, text) if path.suffix == ".json" else text


def _messages(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): give a list of chat messages.") from None
    messages = document.get("messages") if isinstance(document, dict) else document
    if not isinstance(messages, list) or not messages or not all(map(is_message, messages)):
        raise InputError(f'{path} holds no chat: give [{{"role": "user", "content": "..."}}, ...].')
    return messages


def is_message(message: Any) -> bool:
    """Whether a value from outside is a chat message: a role, and content or tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), str | list) or bool(message.get("tool_calls"))


def encode(tokenizer: Tokenizer, prompt: str | list[dict[str, Any]]) -> Tensor:
    """Token ids [1, n] of a text or, through the chat template, of messages."""
    return torch.tensor([token_ids(tokenizer, prompt)])


def token_ids(tokenizer: Tokenizer, prompt: str | list[dict[str, Any]]) -> list[int]:
    """The same as a list, which long runs prefer: Transformers is slow at making tensors."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt).input_ids
    elif tokenizer.chat_template is None:
        raise InputError("The tokenizer has no chat template: give the prompt as plain text.")
    else:
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs: they raise what they like
            raise InputError(f"The chat template refuses these messages ({error}): mend the prompt file.") from None
        ids = tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise InputError("The prompt is empty: give at least one token.")
    return ids
