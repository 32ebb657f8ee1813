"""Running arithmetic: a weighted checksum along a walk, every total written out.

    user       Checksum of 3 records along next from 482.
    assistant  482.qty=637 next=193 total=637       1 x 637
               193.qty=904 next=720 total=445       + 2 x 904, modulo 1000
               720.qty=137 next=555 total=856       + 3 x 137, modulo 1000
               answer: 856

(the right column is explanation.) The product is not written, and its weight grows with each step:
a later step is harder, and it needs all the steps before it.
"""

from __future__ import annotations

from itertools import accumulate
from random import Random

from .question import Question, worked
from .transcript import Transcript

MODULUS = 1000


def ask(rng: Random, transcript: Transcript, steps: int) -> Question:
    """Ask for the checksum of `steps` quantities."""
    path = transcript.walk(rng, steps)
    products = (weight * row.qty for weight, row in enumerate(path, start=1))
    totals = [total % MODULUS for total in accumulate(products)]
    lines = [f"{row.id}.qty={row.qty} next={row.next} total={total}" for row, total in zip(path, totals, strict=True)]
    text = f"Checksum of {steps} records along next from {path[0].id}."
    return worked(transcript.messages, text, lines, str(totals[-1]))
