"""From the rows of public data sets to examples: pure functions, one for each data set's documented schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mixquant.errors import InputError
from mixquant.evaluate.engine import Message

Row = dict[str, Any]

BOX = "Reason step by step, and put the final answer into \\boxed{}."
NUMBER = "Reason step by step, and end with the answer as a plain number."
LETTER = 'Answer with one line of the form "The correct answer is (A)".'
CALLS = (
    "You can call these functions. Answer with a JSON list of calls and nothing else, such as "
    '[{"name": "function", "arguments": {"argument": "value"}}].'
)


class Example(NamedTuple):
    """A prompt as chat messages, and what the preset's checker compares with."""

    prompt: list[Message]
    answer: Any


def gsm8k(row: Row) -> Example:
    """{question, answer: "worked steps #### 42"}"""
    return Example(_ask(row["question"], NUMBER), row["answer"].rpartition("####")[2].strip())


def math500(row: Row) -> Example:
    """{problem, solution, answer, subject, level, unique_id}, the answer in LaTeX."""
    return Example(_ask(row["problem"], BOX), row["answer"])


def aime(row: Row) -> Example:
    """{problem, answer}, the answer a text of up to three digits, perhaps with leading zeros or a degree sign."""
    return Example(_ask(row["problem"], BOX), row["answer"])


def longbench_v2(row: Row) -> Example:
    """{context, question, choice_A .. choice_D, answer: "A" .. "D", domain, difficulty, length}"""
    choices = "\n".join(f"({letter}) {row[f'choice_{letter}'].strip()}" for letter in "ABCD")
    text = f"Read the text, then answer the question.\n\n<text>\n{row['context'].strip()}\n</text>"
    return Example(_ask(text, row["question"].strip(), choices, LETTER), row["answer"])


def longmemeval(row: Row) -> Example | None:
    """{question_id, question_type, question, question_date, answer, haystack_dates, haystack_sessions}

    A session is a list of {role, content}. None for questions that have no answer (`..._abs`), and for those about
    preferences, whose "answer" describes good ones.
    """
    if row["question_id"].endswith("_abs") or row["question_type"] == "single-session-preference":
        return None
    dated = zip(row["haystack_dates"], row["haystack_sessions"], strict=True)
    chats = (f"[{date}]\n" + "\n".join(f"{turn['role']}: {turn['content']}" for turn in chat) for date, chat in dated)
    question = f"Today is {row['question_date']}. {row['question']}"
    return Example(_ask("These are our earlier chats.", *chats, question, "Answer in a few words."), str(row["answer"]))


def bfcl(row: Row) -> Example | None:
    """{id, question: [[message, ...]], function: [...], ground_truth: [{name: {argument: [allowed, ...]}}]}

    `ground_truth` comes from the answers' file. None for a row without one.
    """
    if "ground_truth" not in row:
        return None
    functions = "\n".join(json.dumps(function) for function in row["function"])
    return Example([{"role": "system", "content": f"{CALLS}\n\n{functions}"}, *row["question"][0]], row["ground_truth"])


def read(path: Path) -> Iterator[Row]:
    """The rows of a parquet file, of a JSON list, or of JSON lines, whatever the file is called."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        yield from json.loads(text)
    else:  # not splitlines, which also splits at characters that JSON texts may hold
        yield from (json.loads(line) for line in text.split("\n") if line.strip())


def join(rows: Iterable[Row]) -> list[Row]:
    """Rows with the same `id` as one, in the order of their first; rows without an `id` stay as they are."""
    joined: dict[Any, Row] = {}
    for number, row in enumerate(rows):
        joined.setdefault(row.get("id", ("row", number)), {}).update(row)
    return list(joined.values())


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path.name} is a parquet file: pip install 'mixquant[eval]' to read it.") from None
    table: list[Row] = parquet.read_table(path).to_pylist()
    return table


def _ask(*paragraphs: str) -> list[Message]:
    return [{"role": "user", "content": "\n\n".join(paragraphs)}]
