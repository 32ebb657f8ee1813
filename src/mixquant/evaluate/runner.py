"""Runs every item in every arm and appends what came out to the journal.

Order. Batches are fixed by the items alone (task, rung, then length of the prompt), so the same seed gives the same
numbers. Where a backend holds all arms at once, a batch passes through all of them before the next one: they share
what they have in common. Elsewhere the arms come one after another. The reference is always first: its answers are
what the other arms are forced to, and what serves them as drafts.

Resuming. What the journal holds is not run again. The reference's logits are not in it: where another arm still needs
them, they are computed once more, by the same forward.

Stop strings. Engines know none: they write to the end of the turn or to the limit, and the answer is cut behind the
first stop string afterwards. So what is compared between arms, token by token, is the answer and nothing after it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

from mixquant.evaluate.engine import Backend, Engine, Query, TokenIds
from mixquant.evaluate.items import Item
from mixquant.evaluate.logits import LastLogits, SavedLogits
from mixquant.evaluate.metrics import kl_divergence
from mixquant.evaluate.records import Journal, Record
from mixquant.model.arms import REFERENCE
from mixquant.prompts import Tokenizer


@dataclass(frozen=True)
class Batch:
    """Items that run together, and their number in the run."""

    number: int
    items: list[Item]

    @property
    def queries(self) -> list[Query]:
        return [item.query for item in self.items]


def batches(items: Sequence[Item], size: int) -> list[Batch]:
    """Items of one rung together, the shortest prompts first."""

    def rung(item: Item) -> tuple[str, int]:
        return item.place.task, item.place.rung

    def order(item: Item) -> tuple[str, int, int, int, int]:
        return *rung(item), len(item.query.ids), item.place.seed, item.place.index

    groups = [list(group) for _, group in groupby(sorted(items, key=order), key=rung)]
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
        advance: Callable[[str, int], None] = lambda arm, items: None,
    ) -> None:
        """advance: called with each arm and number of items that are done, for a progress bar."""
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
        positions = sum(self._positions(item) for batch in pending for item in batch.items)
        saved = SavedLogits(self.journal.path.with_suffix(".logits"))
        return saved.opened(positions if len(self.arms) > 1 else 0, len(self.tokenizer))

    def _positions(self, item: Item) -> int:
        """Tokens of the reference's answer: known, or as many as a right one has, or as it may have."""
        record = self.journal.records.get(item.key(REFERENCE))
        return len(record.answer if record else item.draft) or item.query.limit

    def _run_group(self, group: Sequence[str], work: Sequence[Batch]) -> None:
        pending = [batch for batch in work if any(self._pending(arm, batch) for arm in group)]
        for batch in work:
            if batch not in pending:
                for arm in group:
                    self.advance(arm, len(batch.items))
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
            self.advance(arm, len(batch.items))

    def _pending(self, arm: str, batch: Batch) -> bool:
        """Whether an arm has anything to do in a batch; the reference has while another arm needs its logits."""
        if any(item.key(arm) not in self.journal.records for item in batch.items):
            return True
        others = [other for other in self.arms if other != REFERENCE]
        return arm == REFERENCE and self.backend.forces and any(self._pending(other, batch) for other in others)

    def _run_reference(self, engine: Engine, batch: Batch) -> None:
        if self._missing(REFERENCE, batch):
            answers = self._generate(engine, batch, [item.draft for item in batch.items])
            self._append(REFERENCE, batch, answers)
        if self.backend.forces and len(self.arms) > 1:
            self.reference.put(batch.number, engine.score(batch.queries, self._reference_answers(batch)))

    def _run_arm(self, arm: str, engine: Engine, batch: Batch) -> None:
        forced = self._reference_answers(batch)
        logits = engine.score(batch.queries, forced) if self.backend.forces else None
        answers = self._generate(engine, batch, forced)
        self._append(arm, batch, answers, logits)

    def _generate(self, engine: Engine, batch: Batch, drafts: Sequence[TokenIds]) -> list[TokenIds]:
        answers = engine.generate(batch.queries, drafts)
        stops = [item.question.stops for item in batch.items]
        return [until(self.tokenizer, answer, *stop) for answer, stop in zip(answers, stops, strict=True)]

    def _reference_answers(self, batch: Batch) -> list[TokenIds]:
        return [self.journal.records[item.key(REFERENCE)].answer for item in batch.items]

    def _missing(self, arm: str, batch: Batch) -> list[int]:
        keys = [item.key(arm) for item in batch.items]
        return [i for i, key in enumerate(keys) if key not in self.journal.records]

    def _append(
        self, arm: str, batch: Batch, answers: Sequence[TokenIds], logits: Sequence[Tensor] | None = None
    ) -> None:
        reference = self.reference.get(batch.number) if logits is not None else []
        records = []
        for i in self._missing(arm, batch):
            record = self._record(arm, batch.items[i], answers[i])
            if logits is not None:
                record = record.diverging(*divergence(reference[i], logits[i]))
            records.append(record)
        self.journal.append(records)

    def _record(self, arm: str, item: Item, answer: TokenIds) -> Record:
        text = _text(self.tokenizer, answer)
        return Record(
            arm=arm, **vars(item.place), prompt_tokens=len(item.query.ids), right=item.question.is_right(text),
            answer=list(answer), text=text,
        )  # fmt: skip


def until(tokenizer: Tokenizer, answer: TokenIds, *stops: str) -> TokenIds:
    """The fewest first tokens of an answer whose text holds one of the strings; all of them where none does."""

    def stopped(length: int) -> bool:
        text = _text(tokenizer, answer[:length])
        return any(stop in text for stop in stops)

    return answer[: bisect_left(range(len(answer)), True, key=stopped)] if stops else answer


def _text(tokenizer: Tokenizer, answer: TokenIds) -> str:
    return tokenizer.decode(answer, skip_special_tokens=True)


def divergence(reference: Tensor, other: Tensor) -> tuple[list[float], list[int]]:
    """KL divergence at each position, to four digits, and the positions whose most likely token is another one."""
    kld = kl_divergence(reference.to(other.device), other).clamp(min=0)  # rounding may leave -1e-17
    flips = (reference.to(other.device).argmax(-1) != other.argmax(-1)).nonzero().flatten()
    return [float(f"{value:.3e}") for value in kld.tolist()], flips.tolist()
