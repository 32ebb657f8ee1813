"""Training rows, made as fast as the GPU eats them.

A row is one conversation: a transcript, then questions of all families with their answers until the
row is full. So one reading of the records is followed by several supervised answers. Only what the
assistant writes counts in the loss.

A batch is a pure function of (seed, step), whatever the number of worker processes. Its random
generator is named `train/...`; those of evaluation (`mixquant.evaluate.tasks.generate`) start with
a task's name. So the two never share an example.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

import numpy as np
from tokenizers import Tokenizer

from mixquant.tasks import TASKS
from mixquant.tasks.transcript import Message, build

BATCH_TOKENS = 98_304
CHARS_PER_TOKEN = 2.6  # a little more than measured, so that rows come out full
MAX_RECORDS = {512: 8, 1024: 26, 1536: 42}
MAX_STEPS = {"lookup": 16, "multihop": 16, "arithmetic": 10, "toolcall": 8}


def render(messages: list[Message]) -> str:
    """What the chat template renders, in plain Python: jinja is too slow for training."""
    return "".join(f"<|im_start|>{m['role']}\n{_body(m)}<|im_end|>\n" for m in messages)


def _body(message: Message) -> str:
    calls = (json.dumps(call["function"]) for call in message.get("tool_calls", ()))
    return str(message["content"]) + "".join(f"<tool_call>\n{c}\n</tool_call>" for c in calls)


def conversation(rng: Random, length: int, growth: float = 1.0) -> str:
    """A transcript and at least `length` tokens of questions and answers about it.

    `growth` (0 to 1) widens the task early in training: fewer records and steps at first.
    """
    records = 3 + int((1 + (MAX_RECORDS[length] - 4) * growth) * rng.random() ** 0.7)
    transcript = build(rng, records)
    text = render(transcript.messages)
    while len(text) < length * CHARS_PER_TOKEN:
        task = rng.choice(tuple(TASKS))
        limit = 1 + (MAX_STEPS[task] - 1) * growth * length / 1536
        steps = min(1 + int(limit * rng.random()), records - 1)
        question = TASKS[task](rng, transcript, steps)
        text += render([question.prompt[-1], {"role": "assistant", "content": question.reference}])
    return text


class Batches:
    """Batch `step` as (tokens, loss weights): a map-style dataset for `torch.utils.data`."""

    def __init__(self, tokenizer: str, seed: int, steps: int) -> None:
        self.tokenizer = Tokenizer.from_file(tokenizer)
        self.seed, self.steps = seed, steps
        self.pad, self.start, self.end = map(
            self.tokenizer.token_to_id, ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        )
        self.assistant = self.tokenizer.encode("assistant").ids[0]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step >= self.steps:
            raise IndexError(step)
        rng = Random(f"train/{self.seed}/{step}")
        progress = step / self.steps
        length = length_at(progress, rng)
        growth = min(1.0, progress / 0.1)
        texts = [conversation(rng, length, growth) for _ in range(BATCH_TOKENS // length)]
        rows = np.full((len(texts), length + 1), self.pad, dtype=np.int64)
        for row, encoding in zip(rows, self.tokenizer.encode_batch_fast(texts), strict=True):
            ids = encoding.ids[: length + 1]
            row[: len(ids)] = ids
        return rows, self.assistant_mask(rows)

    def assistant_mask(self, rows: np.ndarray) -> np.ndarray:
        """True where the next token is written by the assistant, its <|im_end|> included."""
        opens = np.zeros(rows.shape, dtype=np.int8)
        # <|im_start|>, "assistant", newline: the answer is predicted from the newline on
        opens[:, 2:] = (rows[:, :-2] == self.start) & (rows[:, 1:-1] == self.assistant)
        closes = rows == self.end
        return np.asarray(_inside(opens, closes)[:, :-1])


def _inside(opens: np.ndarray, closes: np.ndarray) -> np.ndarray:
    """From each opening position up to, not including, the next closing one."""
    position = np.arange(opens.shape[1])
    last_open = np.maximum.accumulate(np.where(opens, position, -1), axis=1)
    last_close = np.maximum.accumulate(np.where(closes, position, -1), axis=1)
    return last_open > last_close


def length_at(progress: float, rng: Random) -> int:
    """The curriculum: rows of 512 tokens, then mostly 1024, then mostly 1536."""
    if progress < 0.2:
        return 512
    if progress < 0.55:
        return rng.choice((512, 1024, 1024, 1024))
    return rng.choice((512, 1024, 1536, 1536))


def samples(seed: int, count: int) -> Iterator[str]:
    """Conversations to train a tokenizer on."""
    for index in range(count):
        yield conversation(Random(f"train/tokenizer/{seed}/{index}"), 1024)
