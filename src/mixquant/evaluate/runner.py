"""Runs every example in every arm and appends what came out to the journal.

Order. Batches are fixed by the examples alone (task, rung, then length of the prompt), so the same seed gives the same
numbers. Where a backend holds all arms at once, a batch passes through all of them before the next one: they share
what they have in common. Elsewhere the arms come one after another. The reference is always first: its answers are
what the other arms are forced to, and what serves them as drafts.

Resuming. What the journal holds is not run again. The reference's logits are not in it: where another arm still needs
them, they are computed once more, by the same forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from mixquant.errors import InputError
from mixquant.evaluate.engine import Backend, Engine, Query, TokenIds
from mixquant.evaluate.items import Item
from mixquant.evaluate.logits import LastLogits, SavedLogits
from mixquant.evaluate.metrics import kl_divergence
from mixquant.evaluate.records import Journal, Key, Record
from mixquant.model.arms import REFERENCE
from mixquant.prompts import Tokenizer, token_ids

SPARE_TOKENS = 8
"""How much longer than the reference an answer may become."""

LONGEST_ANSWER = 512
"""Where neither the task nor a reference says how long an answer may be."""


@dataclass(frozen=True)
class Example:
    """An item as an engine gets it. draft: a right answer with its end-of-turn token, or nothing."""

    item: Item
    query: Query
    draft: TokenIds

    def key(self, arm: str) -> Key:
        """Of its record in an arm."""
        return arm, self.item.task, self.item.rung, self.item.seed, self.item.index


@dataclass(frozen=True)
class Batch:
    """Examples that run together, and their number in the run."""

    number: int
    examples: list[Example]

    @property
    def queries(self) -> list[Query]:
        return [example.query for example in self.examples]


def prepare(items: Sequence[Item], tokenizer: Tokenizer, window: int | None) -> list[Example]:
    """Tokenize; InputError for an item whose prompt and answer exceed the model's context window."""
    examples = []
    for item in items:
        ids = item.ids or token_ids(tokenizer, item.prompt)
        draft = [] if item.reference is None else _draft(tokenizer, item.reference)
        limit = item.limit or (len(draft) + SPARE_TOKENS if draft else LONGEST_ANSWER)
        if window is not None and len(ids) + limit > window:
            raise InputError(
                f"Example {item.index} of {item.task} has {len(ids)} prompt tokens and up to {limit} in its answer, "
                f"more than the context window of {window}: shorten it, or lower its max_tokens."
            )
        examples.append(Example(item, Query(item.prompt, ids, limit), draft))
    return examples


def _draft(tokenizer: Tokenizer, reference: str) -> TokenIds:
    ids: TokenIds = tokenizer(reference, add_special_tokens=False).input_ids
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def batches(examples: Sequence[Example], size: int) -> list[Batch]:
    """Examples of one rung together, the shortest prompts first."""

    def rung(example: Example) -> tuple[str, int]:
        return example.item.task, example.item.rung

    def place(example: Example) -> tuple[str, int, int, int, int]:
        return *rung(example), len(example.query.ids), example.item.seed, example.item.index

    groups = [list(group) for _, group in groupby(sorted(examples, key=place), key=rung)]
    chunks = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    return [Batch(number, chunk) for number, chunk in enumerate(chunks)]


class Runner:
    """One run: a backend, its arms, and the journal that it fills."""

    def __init__(
        self,
        backend: Backend,
        arms: Sequence[str],
        tokenizer: Tokenizer,
        journal: Journal,
        advance: Callable[[str, int], None] = lambda arm, examples: None,
    ) -> None:
        """advance: called with each arm and number of examples that are done, for a progress bar."""
        self.backend = backend
        self.arms = sorted(arms, key=lambda arm: arm != REFERENCE)
        self.tokenizer = tokenizer
        self.journal = journal
        self.advance = advance
        self.seconds = dict.fromkeys(self.arms, 0.0)

    def run(self, work: Sequence[Batch]) -> None:
        """Run all batches in all arms; what the journal holds is passed over."""
        groups = [self.arms] if self.backend.together else [[arm] for arm in self.arms]
        with self._reference_logits(work) as self.reference:
            for group in groups:
                self._run_group(group, work)

    def _reference_logits(self, work: Sequence[Batch]) -> AbstractContextManager[LastLogits | SavedLogits]:
        if self.backend.together or not self.backend.forces:
            return nullcontext(LastLogits())
        pending = [batch for batch in work if self._pending(REFERENCE, batch)]
        positions = sum(self._positions(example) for batch in pending for example in batch.examples)
        saved = SavedLogits(self.journal.path.with_suffix(".logits"))
        return saved.opened(positions if len(self.arms) > 1 else 0, len(self.tokenizer))

    def _positions(self, example: Example) -> int:
        """Tokens of the reference's answer: known, or as many as a right one has, or as it may have."""
        record = self.journal.records.get(example.key(REFERENCE))
        return len(record.answer if record else example.draft) or example.query.limit

    def _run_group(self, group: Sequence[str], work: Sequence[Batch]) -> None:
        pending = [batch for batch in work if any(self._pending(arm, batch) for arm in group)]
        for batch in work:
            if batch not in pending:
                for arm in group:
                    self.advance(arm, len(batch.examples))
        if not pending and self.journal.facts.keys() >= set(group):
            return
        with ExitStack() as stack:
            engines = {arm: stack.enter_context(closing(self.backend.open(arm))) for arm in group}
            for arm, engine in engines.items():
                self.journal.note(arm, {"emulated": engine.emulated, "kernels": engine.kernels})
            for batch in pending:
                self._run_batch(engines, batch)

    def _run_batch(self, engines: Mapping[str, Engine], batch: Batch) -> None:
        for arm, engine in engines.items():
            start = time.perf_counter()
            if self._pending(arm, batch):
                if arm == REFERENCE:
                    self._run_reference(engine, batch)
                else:
                    self._run_arm(arm, engine, batch)
            self.seconds[arm] += time.perf_counter() - start
            self.advance(arm, len(batch.examples))

    def _pending(self, arm: str, batch: Batch) -> bool:
        """Whether an arm has anything to do in a batch; the reference has while another arm needs its logits."""
        if any(example.key(arm) not in self.journal.records for example in batch.examples):
            return True
        others = [other for other in self.arms if other != REFERENCE]
        return arm == REFERENCE and self.backend.forces and any(self._pending(other, batch) for other in others)

    def _run_reference(self, engine: Engine, batch: Batch) -> None:
        if self._missing(REFERENCE, batch):
            answers = engine.generate(batch.queries, [example.draft for example in batch.examples])
            self._append(REFERENCE, batch, answers)
        if self.backend.forces and len(self.arms) > 1:
            self.reference.put(batch.number, engine.score(batch.queries, self._reference_answers(batch)))

    def _run_arm(self, arm: str, engine: Engine, batch: Batch) -> None:
        forced = self._reference_answers(batch)
        logits = engine.score(batch.queries, forced) if self.backend.forces else None
        answers = engine.generate(batch.queries, forced)
        self._append(arm, batch, answers, logits)

    def _reference_answers(self, batch: Batch) -> list[TokenIds]:
        return [self.journal.records[example.key(REFERENCE)].answer for example in batch.examples]

    def _missing(self, arm: str, batch: Batch) -> list[int]:
        keys = [example.key(arm) for example in batch.examples]
        return [place for place, key in enumerate(keys) if key not in self.journal.records]

    def _append(
        self, arm: str, batch: Batch, answers: Sequence[TokenIds], logits: Sequence[Tensor] | None = None
    ) -> None:
        reference = self.reference.get(batch.number) if logits is not None else []
        records = []
        for place in self._missing(arm, batch):
            record = self._record(arm, batch.examples[place], answers[place])
            if logits is not None:
                record = record.diverging(*divergence(reference[place], logits[place]))
            records.append(record)
        self.journal.append(records)

    def _record(self, arm: str, example: Example, answer: TokenIds) -> Record:
        item, text = example.item, str(self.tokenizer.decode(answer, skip_special_tokens=True))
        return Record(
            arm=arm, task=item.task, rung=item.rung, seed=item.seed, index=item.index, label=item.label,
            prompt_tokens=len(example.query.ids), right=item.is_right(text), answer=list(answer), text=text,
        )  # fmt: skip


def divergence(reference: Tensor, other: Tensor) -> tuple[list[float], list[int]]:
    """KL divergence at each position, to four digits, and the positions whose most likely token is another one."""
    kld = kl_divergence(reference.to(other.device), other).clamp(min=0)  # rounding may leave -1e-17
    flips = (reference.to(other.device).argmax(-1) != other.argmax(-1)).nonzero().flatten()
    return [float(f"{value:.3e}") for value in kld.tolist()], flips.tolist()
