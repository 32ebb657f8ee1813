"""Long-context retrieval: two records among many, in a context of a stated length.

    system     role, tools, and the form of the answer in plain words
    user       "Load all records."
    assistant  <tool_call> list_records, page 1, then <tool_call> read_log, page 1, then page 2, ...
    user       "Sort qty of 482, 193."
    assistant  482.qty=637
               193.qty=904
               answer: 637,904

The question is the easiest of the agent ladder's (`lookup`), so what is hard is the length alone. About a third of the
context is records, each of which could have been asked for; log lines fill the rest, to within a line, by the model's
own tokenizer. The two records asked for stand half a transcript apart, and the first of them moves through the
transcript with the example's index, so ten examples in a row cover all depths evenly.

Numbers of records and needles were fixed on the demo model's BF16 accuracy alone. That model was trained up to 1.5K
tokens and reads 3K, so its ladder goes from always right to mostly wrong; a larger model's goes on to its own window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

from mixquant.prompts import Tokenizer, token_ids

from .question import worked
from .transcript import EVENTS, SYSTEM, Message, Record, build, tool_call

LENGTHS = (1024, 2048, 3072, *(1 << power for power in range(12, 21)))
"""Tokens of context, prompt and answer together: 1K, 2K, 3K, and octaves from 4K to 1M."""

ANSWER_TOKENS = 48
"""What each context keeps free for the answer."""

DEPTHS = 10
FORM = "Finish with one line: answer: and the quantities asked for, in ascending order, separated by commas."
_TOKENS_PER_RECORD = 64  # of context; the record itself has about 24
_MOST_RECORDS = 800  # ids have three digits
_PAGE = 8


class Haystack(NamedTuple):
    """Messages of length - ANSWER_TOKENS tokens, a right answer in full, and its result."""

    messages: list[Message]
    reference: str
    answer: str


def generate(tokenizer: Tokenizer, length: int, seed: int, index: int) -> Haystack:
    """Example `index` of a data seed for a context of `length` tokens; the text depends on the tokenizer as well."""
    rng = Random(f"retrieval/{length}/{seed}/{index}")
    rows = build(rng, min(length // _TOKENS_PER_RECORD, _MOST_RECORDS)).records
    needles = _needles(rows, index)
    quantities = ",".join(str(qty) for qty in sorted(row.qty for row in needles))
    question = worked(
        f"Sort qty of {', '.join(row.id for row in needles)}.",
        [f"{row.id}.qty={row.qty}" for row in needles],
        quantities,
    )
    lines = _fill(tokenizer, _messages(rows, [], question.text), length - ANSWER_TOKENS, rng)
    return Haystack(_messages(rows, lines, question.text), question.reference, question.answer)


def _needles(rows: Sequence[Record], index: int) -> tuple[Record, Record]:
    first = index % DEPTHS * len(rows) // DEPTHS
    return rows[first], rows[(first + len(rows) // 2) % len(rows)]


def _fill(tokenizer: Tokenizer, messages: list[Message], target: int, rng: Random) -> list[str]:
    """As many log lines as bring the prompt up to `target` tokens."""
    room = target - len(token_ids(tokenizer, messages))
    chosen: list[str] = []
    while room > 0:
        lines = [_line(rng) for _ in range(room // 16 + 1)]  # about as many as fit: the others are tokenized in vain
        for line, ids in zip(lines, tokenizer(lines, add_special_tokens=False).input_ids, strict=True):
            room -= len(ids) + 1  # a line break
            if room < 0:
                break
            chosen.append(line)
    return chosen


def _line(rng: Random) -> str:
    return f"{rng.randrange(100, 1000)} {rng.choice(EVENTS)} {rng.randrange(100, 1000)} ms"


def _messages(rows: Sequence[Record], lines: Sequence[str], question: str) -> list[Message]:
    return [
        {"role": "system", "content": f"{SYSTEM}\n{FORM}"},
        {"role": "user", "content": "Load all records."},
        *_turns(rows, lines),
        {"role": "assistant", "content": f"All {len(rows)} records are loaded."},
        {"role": "user", "content": question},
    ]


def _turns(rows: Sequence[Record], lines: Sequence[str]) -> Iterator[Message]:
    """Page by page the records, and after each page its share of the log."""
    pages = [rows[start : start + _PAGE] for start in range(0, len(rows), _PAGE)]
    for number, page in enumerate(pages, start=1):
        log = lines[len(lines) * (number - 1) // len(pages) : len(lines) * number // len(pages)]
        listed = ",".join(row.dump() for row in page)
        yield tool_call("list_records", {"page": number})
        yield {"role": "tool", "content": f'{{"page":{number},"records":[{listed}]}}'}
        yield tool_call("read_log", {"page": number})
        yield {"role": "tool", "content": "\n".join(log)}
