"""The evaluator's engine on Transformers: all arms of one converted model, sharing what they have in common.

    prompt[:-1]          prefill, once for every kind of it: `bf16` shares it with `decode-only`, `phase` with `uniform`
    prompt[-1], answer   decode: one forward scores a whole answer, since its tokens are known

A tail of more than one token is decode as well, in a forward of its own before that.

A greedy answer needs no forward for each token either: the reference's answer serves as a draft. One forward gives
the arm's own choice at each of its tokens; as far as they agree, the draft is what the arm writes, and at the first
that differs the arm goes on alone, with the rest of the draft as its next guess. This is speculative decoding whose
draft model is the reference, and exact as such: the KV cache only ever keeps what was accepted. The forward that
scores a divergence and the one that verifies the draft are the same one.

Batches are the caller's, and a sequence's numbers do not depend on its batch mates beyond the rounding of the matrix
library; `bf16-control` reads the same batch in two halves, to measure just that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixquant.checkpoint.locate import Found
from mixquant.devices import device_name
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.integrations.transformers.loading import load_model
from mixquant.integrations.transformers.ragged import Ragged, extend, prefill
from mixquant.model import arms
from mixquant.policy import arm as arm_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_PROMPTS = 4
"""Prompt caches that are kept: precise, quantized, and the control's two halves."""


class TransformersBackend:
    """A model converted to the phase arm of a format, from which every arm is opened."""

    name = "transformers"
    together = True
    forces = True

    def __init__(self, model: PreTrainedModel) -> None:
        """model: converted to the phase arm of the format that is evaluated."""
        self.model = model
        self.device = device_name(model.device)
        self.stop = stop_tokens(model)
        self.tail = max(1, model.mixquant_policy.tail)
        self._prompts: OrderedDict[tuple[object, ...], Ragged] = OrderedDict()

    @classmethod
    def load(cls, found: Found, format: str, device: torch.device, tail: int = 1) -> TransformersBackend:
        """MODEL, converted to the phase arm while it loads. tail: how many of the last prompt tokens are decode."""
        return cls(load_model(found, replace(arm_policy("phase", format), tail=tail), device))

    def open(self, arm: str) -> TransformersEngine:
        return TransformersEngine(self, arm)

    def read(self, kind: object, queries: Sequence[Query]) -> Ragged:
        """The KV cache of all prompts but their tails; kept for the arms that read them the same way."""
        key = (kind, *(tuple(query.ids) for query in queries))
        if key not in self._prompts:
            while len(self._prompts) >= KEPT_PROMPTS:
                self._prompts.popitem(last=False)
            self._prompts[key] = prefill(self.model, [query.ids[: -self.tail] for query in queries])
        self._prompts.move_to_end(key)
        return self._prompts[key]


class TransformersEngine:
    """One arm of a backend's model."""

    def __init__(self, backend: TransformersBackend, arm: str) -> None:
        self.backend = backend
        self.arm = arm
        self.kernels, self.emulated = arms.kernels_in(backend.model, arm)
        self._last: dict[object, tuple[object, tuple[Tensor, Ragged]]] = {}  # the forced answers of the last batch

    def generate(self, queries: Sequence[Query], drafts: Sequence[TokenIds] | None = None) -> list[TokenIds]:
        drafts = [[] for _ in queries] if drafts is None else drafts
        with arms.running(self.backend.model, self.arm):
            return [
                answer for part in self._parts(queries) for answer in self._write(part, queries[part], drafts[part])
            ]

    def score(self, queries: Sequence[Query], answers: Sequence[TokenIds]) -> list[Tensor]:
        with arms.running(self.backend.model, self.arm):
            parts = [self._score(part, queries[part], answers[part]) for part in self._parts(queries)]
        return list(chain.from_iterable(parts))

    def close(self) -> None:
        self._last.clear()

    def _parts(self, queries: Sequence[Query]) -> list[slice]:
        """The batches in which this arm runs a batch."""
        half = (len(queries) + 1) // 2
        whole = self.arm != arms.CONTROL or len(queries) < 2
        return [slice(None)] if whole else [slice(half), slice(half, None)]

    def _score(self, part: slice, queries: Sequence[Query], answers: Sequence[TokenIds]) -> list[Tensor]:
        logits, _ = self._forced(part, queries, answers)
        return [row[: len(answer)] for row, answer in zip(logits, answers, strict=True)]

    def _forced(self, part: slice, queries: Sequence[Query], answers: Sequence[TokenIds]) -> tuple[Tensor, Ragged]:
        """One forward over each prompt's last token and its answer; kept for `score`'s or `generate`'s counterpart."""
        key = [query.ids for query in queries], list(answers)
        known, found = self._last.pop(part.start, (None, None))
        if found is None or known != key:
            found = self._extend_prompts(queries, answers)
            self._last[part.start] = key, found
        return found

    def _extend_prompts(self, queries: Sequence[Query], answers: Sequence[TokenIds]) -> tuple[Tensor, Ragged]:
        kind = "quantized" if arms.quantizes(self.arm)[0] else "precise"
        state = self.backend.read(kind, queries)
        if self.backend.tail > 1:
            _, state = extend(self.backend.model, state, [query.ids[-self.backend.tail : -1] for query in queries])
        tokens = [[query.ids[-1], *answer] for query, answer in zip(queries, answers, strict=True)]
        return extend(self.backend.model, state, tokens)

    def _write(self, part: slice, queries: Sequence[Query], drafts: Sequence[TokenIds]) -> list[TokenIds]:
        """Greedy answers: verify the drafts, then go on with the sequences that are not finished."""
        writers = [_Writer(query.limit, draft, self.backend.stop) for query, draft in zip(queries, drafts, strict=True)]
        logits, state = self._forced(part, queries, drafts)
        active, guesses = writers, [list(draft) for draft in drafts]
        while True:
            choices = logits.argmax(-1).tolist()
            counts = [1 + w.accept(guess, row) for w, guess, row in zip(active, guesses, choices, strict=True)]
            rows = [i for i, writer in enumerate(active) if not writer.finished]
            if not rows:
                return [writer.answer for writer in writers]
            state = state.keep(counts, logits.shape[1])
            if len(rows) < len(active):
                state, active = state.select(rows), [active[i] for i in rows]
            state = state.compact()
            guesses = [writer.guess() for writer in active]
            tokens = [[writer.answer[-1], *guess] for writer, guess in zip(active, guesses, strict=True)]
            logits, state = extend(self.backend.model, state, tokens)


class _Writer:
    """One answer in the making."""

    def __init__(self, limit: int, draft: TokenIds, stop: frozenset[int]) -> None:
        self.answer: TokenIds = []
        self.finished = False
        self._limit = limit
        self._draft = draft
        self._stop = stop
        self._trust = len(draft)  # how much of the draft's rest is worth a guess

    def accept(self, guess: TokenIds, choices: Sequence[int]) -> int:
        """Take the model's choices after the last token and after each guessed one, as far as the guess was right.

        Returns how many guessed tokens were.
        """
        right = 0
        for place in range(len(guess) + 1):
            self.answer.append(choices[place])
            self.finished = choices[place] in self._stop or len(self.answer) >= self._limit
            if self.finished or place == len(guess) or choices[place] != guess[place]:
                break
            right += 1
        self._trust = 2 * right + 1
        return right

    def guess(self) -> TokenIds:
        """The draft's rest, as if it went on where the answer stands; shorter after a guess that failed early."""
        return self._draft[len(self.answer) :][: self._trust]


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Ids of the tokens that end an answer."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        ids = model.config.eos_token_id
    return frozenset([] if ids is None else [ids] if isinstance(ids, int) else ids)
