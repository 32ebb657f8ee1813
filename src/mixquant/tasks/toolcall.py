"""Tool call: fill the JSON arguments of a call from several records.

    user       Move 482, 193 to 720.
    assistant  <tool_call>
               {"name": "move", "arguments": {"items": [{"id": "482", "qty": 637},
               {"id": "193", "qty": 904}], "to": "720", "total": 1541}}
               </tool_call>

(the JSON is one line.) The total of all quantities has to be found in one go.
"""

from __future__ import annotations

import json
from random import Random

from .question import Question, asked
from .transcript import Transcript


def ask(rng: Random, transcript: Transcript, steps: int) -> Question:
    """Ask for a call with `steps` items."""
    *rows, target = rng.sample(transcript.records, steps + 1)
    items = [{"id": row.id, "qty": row.qty} for row in rows]
    total = sum(row.qty for row in rows)
    call = {"name": "move", "arguments": {"items": items, "to": target.id, "total": total}}
    text = f"Move {', '.join(row.id for row in rows)} to {target.id}."
    reference = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    return asked(transcript.messages, text, reference, json.dumps(call, sort_keys=True))
