"""Runs every item in every arm and appends what came out to the journal.

Order. Batches are fixed by the items alone (task, rung, then length of the prompt), so the same seed gives the same
numbers. Where a backend holds all arms at once, a batch passes through all of them before the next one: they share
what they have in common. Elsewhere the arms come one after another. The reference is always first: its answers are
what the other arms are forced to, and what serves them as drafts.

Controls. The control of a quantized arm writes nothing: it is forced to the reference's answers like every arm, and
compared with the arm itself as well.

Resuming. What the journal holds is not run again. Logits are not in it: where another arm still needs those of the
reference, or of the arm whose control it is, they are computed once more, by the same forward.

Stop strings. Engines know none: they write to the end of the turn or to the limit, and the answer is cut behind the
first stop string afterwards. So what is compared between arms, token by token, is the answer and nothing after it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor

from mixquant.evaluate.engine import Backend, Engine, Query, TokenIds
from mixquant.evaluate.items import Item
from mixquant.evaluate.logits import LastLogits, SavedLogits
from mixquant.evaluate.metrics import kl_divergence
from mixquant.evaluate.records import Journal, Record
from mixquant.policy import REFERENCE, controlled
from mixquant.prompts import Tokenizer

TOKENS = 3072
"""What an example of a full batch may take, prompt and answer: longer ones come in smaller batches."""


def writes(arm: str) -> bool:
    """Whether an arm writes answers of its own: a quantized arm's control need not."""
    return controlled(arm) in (None, REFERENCE)


@dataclass(frozen=True)
class Batch:
    """Items that run together, and their number in the run."""

    number: int
    items: list[Item]

    @property
    def queries(self) -> list[Query]:
        return [item.query for item in self.items]


def batches(items: Sequence[Item], size: int) -> list[Batch]:
    """Items of one rung together, the shortest prompts first; fewer than `size` where they are long."""

    def rung(item: Item) -> tuple[str, int]:
        return item.place.task, item.place.rung

    def order(item: Item) -> tuple[str, int, int, int, int]:
        return *rung(item), len(item.query.ids), item.place.seed, item.place.index

    groups = [list(group) for _, group in groupby(sorted(items, key=order), key=rung)]
    chunks = [chunk for group in groups for chunk in _chunks(group, size)]
    return [Batch(number, chunk) for number, chunk in enumerate(chunks)]


def _chunks(group: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """At most `size` items, and no more than that many of `TOKENS` would take: they are padded to the longest."""
    chunk: list[Item] = []
    for item in group:
        if chunk and (len(chunk) == size or (len(chunk) + 1) * item.tokens > size * TOKENS):
            yield chunk
            chunk = []
        chunk.append(item)
    yield chunk


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
        self.arms = sorted(arms, key=lambda arm: (arm != REFERENCE, controlled(arm) not in (None, REFERENCE)))
        self.tokenizer = tokenizer
        self.journal = journal
        self.advance = advance
        self.seconds = dict.fromkeys(self.arms, 0.0)

    def run(self, work: Sequence[Batch]) -> None:
        """Run all batches in all arms; what the journal holds is passed over."""
        groups = [self.arms] if self.backend.together else [[arm] for arm in self.arms]
        with ExitStack() as stack:
            self.logits = {arm: stack.enter_context(self._store(arm, work)) for arm in self.arms if self._readers(arm)}
            for group in groups:
                self._run_group(group, work)

    def _readers(self, arm: str) -> list[str]:
        """The arms that are compared with this one, logits by logits."""
        if not self.backend.forces:
            return []
        return [other for other in self.arms if other != arm and arm in (REFERENCE, controlled(other))]

    def _store(self, arm: str, work: Sequence[Batch]) -> AbstractContextManager[LastLogits | SavedLogits]:
        if self.backend.together:
            return nullcontext(LastLogits())
        pending = [batch for batch in work if self._pending(arm, batch)]
        positions = sum(self._positions(item) for batch in pending for item in batch.items)
        name = ".logits" if arm == REFERENCE else f".{arm}.logits"
        return SavedLogits(self.journal.path.with_suffix(name)).opened(positions, len(self.tokenizer))

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
                run = self._run_reference if arm == REFERENCE else self._run_arm
                run(arm, engine, batch)
            self.seconds[arm] += time.perf_counter() - start
            self.advance(arm, len(batch.items))

    def _pending(self, arm: str, batch: Batch) -> bool:
        """Whether an arm has anything to do in a batch; it has while another arm needs its logits."""
        return bool(self._missing(arm, batch)) or any(self._pending(other, batch) for other in self._readers(arm))

    def _run_reference(self, arm: str, engine: Engine, batch: Batch) -> None:
        if self._missing(arm, batch):
            answers = self._generate(engine, batch, [item.draft for item in batch.items])
            self._append(arm, batch, answers)
        if arm in self.logits:
            self.logits[arm].put(batch.number, engine.score(batch.queries, self._reference_answers(batch)))

    def _run_arm(self, arm: str, engine: Engine, batch: Batch) -> None:
        forced = self._reference_answers(batch)
        logits = engine.score(batch.queries, forced) if self.backend.forces else None
        if logits is not None and arm in self.logits:
            self.logits[arm].put(batch.number, logits)
        if self._missing(arm, batch):
            answers = self._generate(engine, batch, forced) if writes(arm) else [[] for _ in batch.items]
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
        records = {i: self._record(arm, batch.items[i], answers[i]) for i in self._missing(arm, batch)}
        if logits is not None:
            reference = self.logits[REFERENCE].get(batch.number)
            for i, record in records.items():
                kld, flips = divergence(reference[i], logits[i])
                records[i] = replace(record, kld=kld, flips=flips)
            if (base := controlled(arm)) in self.logits and base != REFERENCE:
                drawn = self.logits[base].get(batch.number)
                records = {i: replace(r, redraw=divergence(drawn[i], logits[i])[0]) for i, r in records.items()}
        self.journal.append(records.values())

    def _record(self, arm: str, item: Item, answer: TokenIds) -> Record:
        text = _text(self.tokenizer, answer)
        return Record(
            arm=arm, **vars(item.place), prompt_tokens=len(item.query.ids), right=item.question.is_right(text),
            answer=list(answer), text=text, nearly=item.question.is_nearly_right(text),
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
