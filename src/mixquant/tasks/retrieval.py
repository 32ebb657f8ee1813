"""Long-context retrieval: two records among many, in a context of a stated length.

    system     role, tools, and the form of the answer in plain words
    user       "Load all records."
    assistant  <tool_call> list_records, page 1, then <tool_call> read_log, page 1, then page 2, ...
    user       "Sort qty of 482, 193."
    assistant  482.qty=637
               193.qty=904
               answer: 637,904

Models without a chat template read it in words (`mixquant.prompts.plain`). The question is the easiest of the agent
ladder's (`lookup`), so what is hard is the length alone. About a third of the context is records, each of which could
have been asked for; log lines fill the rest, to within a line, by the model's own tokenizer. The two records asked for
stand half a transcript apart, and the first of them moves through the transcript with the example's index, so ten
examples in a row cover all depths evenly.

Numbers of records and needles were fixed on the demo model's BF16 accuracy alone. That model was trained up to 1.5K
tokens and reads 3K, so its ladder goes from always right to mostly wrong; a larger model's goes on to its own window.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

from mixquant.prompts import Message, Tokenizer, plain, token_ids

from .lookup import sorting
from .question import Question, worked
from .transcript import EVENTS, SYSTEM, Record, build, loading, log_page, record_page

LENGTHS = (1024, 2048, 3072, *(1 << power for power in range(12, 21)))
"""Tokens of context, prompt and answer together: 1K, 2K, 3K, and octaves from 4K to 1M."""

ANSWER_TOKENS = 48
"""What each context keeps free for the answer."""

DEPTHS = 10
FORM = "Finish with one line: answer: and the quantities asked for, in ascending order, separated by commas."
_TOKENS_PER_RECORD = 64  # of context; the record itself has about 24
_MOST_RECORDS = 800  # ids have three digits
_PAGE = 8


def generate(tokenizer: Tokenizer, length: int, seed: int, index: int) -> Question:
    """Question `index` of a data seed for a context of `length` tokens; the text depends on the tokenizer as well."""
    rng = Random(f"retrieval/{length}/{seed}/{index}")
    rows = build(rng, min(length // _TOKENS_PER_RECORD, _MOST_RECORDS)).records
    sort = sorting(_needles(rows, index))

    def ask(lines: Sequence[str]) -> Question:
        messages = loading(f"{SYSTEM}\n{FORM}", _turns(rows, lines), len(rows))
        question = worked(messages, *sort)
        if tokenizer.chat_template is not None:
            return question
        return replace(question, prompt=plain([*messages, {"role": "user", "content": sort[0]}]))

    lines = _fill(tokenizer, ask([]), length - ANSWER_TOKENS, rng)
    return replace(ask(lines), check=ends_in, limit=ANSWER_TOKENS)


def ends_in(text: str, answer: str) -> bool:
    """Whether the numbers after the last "answer" are the right ones: a chat model may write them in its own way."""
    return re.findall(r"\d+", text.casefold().rpartition("answer")[2]) == answer.split(",")


def _needles(rows: Sequence[Record], index: int) -> tuple[Record, Record]:
    first = index % DEPTHS * len(rows) // DEPTHS
    return rows[first], rows[(first + len(rows) // 2) % len(rows)]


def _fill(tokenizer: Tokenizer, question: Question, target: int, rng: Random) -> list[str]:
    """As many log lines as bring the prompt up to `target` tokens."""
    missing = target - len(token_ids(tokenizer, question.prompt))
    chosen: list[str] = []
    while missing > 0:
        lines = [_line(rng) for _ in range(missing // 16 + 1)]  # about as many as fit: the others are tokenized in vain
        for line, ids in zip(lines, tokenizer(lines, add_special_tokens=False).input_ids, strict=True):
            missing -= len(ids) + 1  # a line break
            if missing < 0:
                break
            chosen.append(line)
    return chosen


def _line(rng: Random) -> str:
    return f"{rng.randrange(100, 1000)} {rng.choice(EVENTS)} {rng.randrange(100, 1000)} ms"


def _turns(rows: Sequence[Record], lines: Sequence[str]) -> Iterator[Message]:
    """Page by page the records, and after each page its share of the log."""
    pages = [rows[start : start + _PAGE] for start in range(0, len(rows), _PAGE)]
    for number, page in enumerate(pages, start=1):
        yield from record_page(number, page)
        yield from log_page(number, lines[len(lines) * (number - 1) // len(pages) : len(lines) * number // len(pages)])
