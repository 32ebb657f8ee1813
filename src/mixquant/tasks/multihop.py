"""Multi-hop look-up: follow `next` from record to record, then read a field of the last.

    user       Follow next 2 times from 482. Report qty.
    assistant  482.next=193
               193.next=720
               720.qty=137
               answer: 137

One wrong hop, or one hop too many, and the answer is wrong.
"""

from __future__ import annotations

from random import Random

from .question import Question, worked
from .transcript import Transcript


def ask(rng: Random, transcript: Transcript, steps: int) -> Question:
    """Ask for the quantity that is `steps` hops away."""
    *path, last = transcript.walk(rng, steps + 1)
    lines = [f"{row.id}.next={row.next}" for row in path]
    lines.append(f"{last.id}.qty={last.qty}")
    start = path[0].id if path else last.id
    text = f"Follow next {steps} times from {start}. Report qty."
    return worked(transcript.messages, text, lines, str(last.qty))
