"""An agent transcript: a system prompt with tools, tool calls, JSON tool results and noise.

    system     role, and the tools as JSON schemas
    user       "Load all records."
    assistant  <tool_call> list_records, page 1      (then page 2, ... and now and then read_log)
    tool       {"page":1,"records":[{"id":"482","qty":137,"next":"193","site":"oslo"},...]}
    assistant  "All N records are loaded."
    user       the question of a task family

Every family asks about the same kind of records: `next` links them in one cycle through all of
them, so a walk never meets a record twice before it has met all. A record costs about 23 tokens of
the demo model, which reads numbers digit by digit: it has to match keys of three tokens. The
sites and the log lines answer nothing: they are there to be read over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from mixquant.prompts import Message

SITES = (
    *("oslo", "lima", "cairo", "delhi", "kyoto", "milan", "paris", "quito", "sofia", "tunis"),
    *("bern", "riga", "dakar", "hanoi", "porto", "seoul"),
)
EVENTS = ("sync ok", "retry", "cache miss", "disk ok", "timeout", "heartbeat")


def _tool(name: str, **kinds: str) -> Message:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [
    _tool("list_records", page="integer"),
    _tool("read_log", page="integer"),
    _tool("move", items="array", to="string", total="integer"),
]
ROLE = "You are a warehouse agent. Answer from the records, step by step."
# What the chat template makes of ROLE and `tools=TOOLS`, so messages alone are the whole prompt.
SYSTEM = "\n".join([ROLE, "# Tools", *(json.dumps(tool) for tool in TOOLS)])


class Record(NamedTuple):
    """One row of the warehouse; `next` is the id of another record."""

    id: str
    qty: int
    next: str
    site: str

    def dump(self) -> str:
        """Compact JSON, as tools return it (an f-string: `json.dumps` takes ten times as long)."""
        return f'{{"id":"{self.id}","qty":{self.qty},"next":"{self.next}","site":"{self.site}"}}'


@dataclass(frozen=True)
class Transcript:
    """The records an agent has read, and the messages in which it read them."""

    records: tuple[Record, ...]
    messages: list[Message]

    def walk(self, rng: Random, count: int) -> list[Record]:
        """`count` records, each the `next` of the one before."""
        by_id = {record.id: record for record in self.records}
        path = [rng.choice(self.records)]
        while len(path) < count:
            path.append(by_id[path[-1].next])
        return path


def build(rng: Random, records: int) -> Transcript:
    """A transcript in which an agent has loaded `records` records."""
    rows = _records(rng, records)
    return Transcript(rows, loading(SYSTEM, _pages(rng, rows), records))


def loading(system: str, pages: Iterable[Message], records: int) -> list[Message]:
    """The messages in which an agent loads all records, page by page."""
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": "Load all records."},
        *pages,
        {"role": "assistant", "content": f"All {records} records are loaded."},
    ]


def record_page(page: int, rows: Iterable[Record]) -> list[Message]:
    """A call for a page of records, and what it returns."""
    return _called("list_records", page, f'{{"page":{page},"records":[{",".join(row.dump() for row in rows)}]}}')


def log_page(page: int, lines: Iterable[str]) -> list[Message]:
    """A call for a page of the log, and what it returns."""
    return _called("read_log", page, "\n".join(lines))


def _called(tool: str, page: int, result: str) -> list[Message]:
    """An assistant message that calls one tool, in the form of the OpenAI API, and the tool's."""
    call = {"type": "function", "function": {"name": tool, "arguments": {"page": page}}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": result}]


def _records(rng: Random, count: int) -> tuple[Record, ...]:
    ids = [str(number) for number in rng.sample(range(100, 1000), count)]
    after = dict(zip(ids, ids[1:] + ids[:1], strict=True))
    shown = rng.sample(ids, count)  # the order of the cycle must not be the order on the page
    return tuple(Record(key, rng.randrange(100, 1000), after[key], rng.choice(SITES)) for key in shown)


def _pages(rng: Random, rows: tuple[Record, ...]) -> Iterator[Message]:
    size = rng.randint(6, 10)
    for page, start in enumerate(range(0, len(rows), size), start=1):
        yield from record_page(page, rows[start : start + size])
        if rng.random() < 0.3:
            yield from log_page(page, _log(rng))


def _log(rng: Random) -> Iterator[str]:
    for _ in range(rng.randint(1, 3)):
        event = rng.choice(EVENTS)
        yield f"{rng.randrange(100, 1000)} {event} {rng.randrange(100, 1000)} ms"
