"""JSON values in a model's text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_OPENING = re.compile(r"[{\[]")


def json_values(text: str) -> Iterator[Any]:
    """The JSON objects and lists in a text, in order; the text as a whole where it is one value."""
    decoder, position = json.JSONDecoder(), 0
    unread = (ValueError, RecursionError)  # the latter for thousands of brackets in one another
    try:
        yield json.loads(text)
        return
    except unread:
        pass
    while opening := _OPENING.search(text, position):
        try:
            value, position = decoder.raw_decode(text, opening.start())
            yield value
        except unread:
            position = opening.end()
