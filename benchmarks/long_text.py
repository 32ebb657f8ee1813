"""Long text as task files: the documentation that every Python carries, cut into pieces of some lengths.

    python benchmarks/long_text.py MODEL FOLDER      FOLDER/text-1k.jsonl, -2k, -4k ... up to the model's window

A prompt is a piece of the text as it stands, and no piece overlaps another of its length. The model goes on with it;
an answer counts as right if it holds the next three words of the text.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoConfig, AutoTokenizer

from mixquant.files import write_text

LENGTHS = [1 << power for power in range(10, 16)]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
ANSWER = 64
"""Tokens of an answer."""


def main() -> None:
    model, folder = sys.argv[1], Path(sys.argv[2])
    tokenizer = AutoTokenizer.from_pretrained(model)
    window = AutoConfig.from_pretrained(model).max_position_embeddings
    text = "\n\n".join(documentation())
    places = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    folder.mkdir(exist_ok=True)
    for length in LENGTHS:
        if length <= window:
            rows = pieces(text, [start for start, _ in places], length - ANSWER - 8)
            write_text(folder / f"text-{length >> 10}k.jsonl", "\n".join(rows))


def documentation() -> Iterator[str]:
    """The language reference's topics, then what the modules of the standard library say of themselves, in order."""
    yield from (topics[name] for name in sorted(topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, DOCUMENTED)]
        yield from filter(None, map(ast.get_docstring, nodes))


def pieces(text: str, starts: list[int], length: int) -> list[str]:
    """Lines of a task file: the text in pieces of `length` tokens, of which `starts` are the first characters."""
    ends = range(length, len(starts) - ANSWER, length)
    return [piece(text[starts[end - length] : starts[end]], text[starts[end] :]) for end in ends]


def piece(prompt: str, rest: str) -> str:
    answer = " ".join(re.findall(r"\w+", rest[: 8 * ANSWER])[:3])
    return json.dumps({"prompt": prompt, "answer": answer, "checker": "contains", "max_tokens": ANSWER})


if __name__ == "__main__":
    main()
