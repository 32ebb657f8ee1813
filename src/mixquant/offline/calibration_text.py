"""Calibration text: what a model reads while its activations are measured, as sequences of tokens.

    agents        the shipped agent transcripts, then examples of the agent ladder from a seed of their own
    chats.jsonl   one chat a line, {"messages": [...], "tools": [...]} or the messages alone; or {"text": "..."}
    chats.json    one of these, or a list of them
    FILE          anything else is one text as it stands

Chats go through the model's chat template, and texts end with the tokenizer's end-of-text token if it has one.
Documents are joined into one stream of tokens, and the stream is cut into equal sequences no longer than the model's
context: a document that is longer than that is cut, nothing of it is lost. What lies beyond the tokens that are needed
is not read. The end of the stream is held out: it is run like the rest, but only to measure errors on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.files import parse_json, reading
from mixquant.prompts import Chat, Tokenizer, as_chat, encodes, parse_chat, render

AGENTS = "agents"
SEED = 20_000
"""Data seed of the ladder's examples; no evaluation uses it (see training/README.md)."""

LENGTH = 2048
HELD_OUT, SHARE_HELD_OUT = 256, 8
"""Tokens that are held out, at most, and at most one in so many."""

FEWEST = 16
Document = str | Chat
Documents = Iterator[tuple[str, Document]]
"""(where it stands, document) in turn."""


@dataclass(frozen=True)
class Texts:
    """Calibration sequences, int64 [1, length] each; all but the last have one length.

    The last `held_out` tokens of them all are for measuring.
    """

    source: str
    sequences: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(sequence.shape[1] for sequence in self.sequences)

    @property
    def held_out(self) -> int:
        return min(HELD_OUT, self.tokens // SHARE_HELD_OUT)

    @property
    def counted(self) -> list[int]:
        """How many tokens of each sequence, from its beginning, are not held out."""
        ends = itertools.accumulate(sequence.shape[1] for sequence in self.sequences)
        left = self.tokens - self.held_out
        return [max(0, s.shape[1] - max(0, end - left)) for s, end in zip(self.sequences, ends, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """What a recipe says of them; the hash is over the token ids."""
        digest = hashlib.sha256(torch.cat(self.sequences, 1).numpy().tobytes()).hexdigest()
        counts = {"sequences": len(self.sequences), "tokens": self.tokens, "held_out": self.held_out}
        return {"source": self.source, **counts, "sha256": digest}


def read(source: str, tokenizer: Tokenizer, context: int | None, tokens: int) -> Texts:
    """At most `tokens` tokens of `source`. Raises InputError for a file with hardly any, or with a damaged line."""
    stream: list[int] = []
    for where, document in _agents() if source == AGENTS else _documents(Path(source)):
        stream += _encode(tokenizer, document, where)
        if len(stream) >= tokens:
            break
    if len(stream) < FEWEST:
        raise InputError(
            f"{source} holds {len(stream)} tokens, and {FEWEST} are the fewest to calibrate with: name a longer text."
        )
    ids = torch.tensor(stream[:tokens])
    return Texts(Path(source).name, [part.unsqueeze(0) for part in ids.split(min(LENGTH, context or LENGTH))])


def check(source: str) -> None:
    """Raise InputError where there is no such file."""
    if source != AGENTS and not Path(source).is_file():
        raise InputError(f"{source} is not a file: name a text or JSONL file to calibrate with, agents, or none.")


def _agents() -> Documents:
    """Endless: the shipped transcripts, then examples of all tasks and rungs in turn."""
    from mixquant.tasks import LADDER, generate

    shipped = sorted(files("mixquant.demo").joinpath("transcripts").iterdir(), key=lambda file: file.name)
    for file in shipped:
        yield "the shipped transcripts", Chat(json.loads(file.read_text(encoding="utf-8"))["messages"])
    for index in itertools.count():
        for task, rungs in LADDER.items():
            for rung in range(len(rungs)):
                example = generate(task, rung, SEED, index)
                answer = {"role": "assistant", "content": example.reference}
                assert not isinstance(example.prompt, str)
                yield "the agent ladder", Chat([*as_chat(example.prompt).messages, answer])


def _documents(path: Path) -> Documents:
    """(where it stands, document) of a file."""
    with reading(path, "name a text or JSONL file"), path.open(encoding="utf-8-sig") as file:  # editors may add a BOM
        yield from _READERS.get(path.suffix, _whole)(path, file)


def _whole(path: Path, file: TextIO) -> Documents:
    yield str(path), file.read()


def _lines(path: Path, file: TextIO) -> Documents:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"line {number} of {path}"
            yield where, _document(parse_json(line, where, "mend or remove it"), where)


def _items(path: Path, file: TextIO) -> Documents:
    value = parse_json(file.read(), path, "mend or remove it")
    if not isinstance(value, list) or _is_chat(value):
        yield str(path), _document(value, str(path))
        return
    for number, item in enumerate(value, start=1):
        where = f"item {number} of {path}"
        yield where, _document(item, where)


_READERS: dict[str, Callable[[Path, TextIO], Documents]] = {".jsonl": _lines, ".json": _items}


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _document(value: Any, where: str) -> Document:
    if isinstance(value, dict) and isinstance(value.get("text"), str):
        return cast(str, value["text"])
    return value if isinstance(value, str) else parse_chat(value, where)


def _encode(tokenizer: Tokenizer, document: Document, where: str) -> list[int]:
    text = document if isinstance(document, str) else render(tokenizer, document, where)
    if "\0" in text or not encodes(text):
        raise InputError(f"{where} holds NUL characters or halves of surrogate pairs: save it as UTF-8 text.")
    if not isinstance(document, str):
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*tokenizer(text).input_ids, *end] if text.strip() else []
