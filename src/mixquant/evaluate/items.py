"""A question in its place of a run, measured for a model: what the runner works on.

Question    in text: prompt, answer, how it is checked      (`mixquant.tasks.question`)
Item        the same with its place, its query and a draft: token ids and limit are determined here, once
Query       what an engine is asked                         (`mixquant.evaluate.engine`)
Record      what one arm answered                           (`mixquant.evaluate.records`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixquant.evaluate.engine import Query, TokenIds
from mixquant.evaluate.records import Key
from mixquant.prompts import Tokenizer, batch_token_ids
from mixquant.tasks.question import Question

MARGIN = 8
"""Tokens that an answer may have more than the reference: its end, and a longer wrong one."""

LONGEST_ANSWER = 256
"""Where neither the task nor a reference says how long an answer may be."""


@dataclass(frozen=True)
class Place:
    """Question `index` of a data seed, on one rung of a task's ladder.

    rung: place on the ladder, 0 where a task has just one. label: what the rung is, for people.
    """

    task: str
    rung: int
    seed: int
    index: int
    label: str = ""


@dataclass(frozen=True)
class Item:
    """A question in its place. draft: its reference with the end-of-turn token, or nothing."""

    place: Place
    question: Question
    query: Query
    draft: TokenIds

    def key(self, arm: str) -> Key:
        """Of its record in an arm."""
        return arm, self.place.task, self.place.rung, self.place.seed, self.place.index

    @property
    def tokens(self) -> int:
        """Of the prompt and the longest answer."""
        return len(self.query.ids) + self.query.limit


def measure(tokenizer: Tokenizer, questions: Sequence[tuple[Place, Question]]) -> list[Item]:
    """Items of questions; tokenized together, which is most of what they cost."""
    found = batch_token_ids(tokenizer, [question.prompt for _, question in questions])
    return [_item(tokenizer, *question, ids) for question, ids in zip(questions, found, strict=True)]


def _item(tokenizer: Tokenizer, place: Place, question: Question, ids: TokenIds) -> Item:
    draft: TokenIds = []
    if question.reference:
        draft = tokenizer(question.reference, add_special_tokens=False).input_ids
    limit = question.limit or (len(draft) + MARGIN if draft else LONGEST_ANSWER)
    if draft and tokenizer.eos_token_id is not None:
        draft = [*draft, tokenizer.eos_token_id]
    return Item(place, question, Query(question.prompt, ids, limit), draft)
