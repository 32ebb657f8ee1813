"""The evaluator's engine on Transformers: all arms of one converted model, sharing what they have in common.

    prompt[:-1]          prefill, once for every kind of it: `bf16` shares it with `decode-only`, `phase` with `uniform`
    prompt[-1], answer   decode: one forward scores a whole answer, since its tokens are known

A longer tail is read again as decode, in a forward of its own: since no token sees a later one, arms that differ in
their tails share what is before it. With a tail of 0 the prompt's last token is prefill, in a forward of its own.

A greedy answer needs no forward for each token either: the reference's answer serves as a draft. One forward gives
the arm's own choice at each of its tokens; as far as they agree, the draft is what the arm writes, and at the first
that differs the arm goes on alone, with the rest of the draft as its next guess. This is speculative decoding whose
draft model is the reference, and exact as such: the KV cache only ever keeps what was accepted. The forward that
scores a divergence and the one that verifies the draft are the same one.

Batches are the caller's, and a sequence's numbers do not depend on its batch mates beyond the rounding of the matrix
library. A control runs the same batch in two halves, and reads prompts through the attention kernel that takes masks,
to measure just that.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixquant.checkpoint.locate import Found
from mixquant.checkpoint.prefill import PrefillWeights
from mixquant.devices import available_bytes, device_name
from mixquant.errors import InputError
from mixquant.evaluate.arms import Arm, standard
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.integrations.transformers.loading import load_model
from mixquant.integrations.transformers.ragged import Ragged, extend, prefill
from mixquant.model import arms
from mixquant.policy import ARMS, Policy
from mixquant.policy import arm as arm_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_BYTES = 1 << 35
"""What the prompt caches that arms share may hold together, besides the last two: 32 GiB, or half of what is free."""


class TransformersBackend:
    """A model converted to the phase arm of a format, from which every arm is opened.

    Arms of other formats or folders get their own quantized weights when they are opened first.
    """

    name = "transformers"
    together = True
    forces = True

    def __init__(self, model: PreTrainedModel, asked: Mapping[str, Arm] | None = None) -> None:
        """model: converted to the phase arm of the format that is evaluated. asked: arms by name; those that have names
        of their own need not be among them."""
        self.model = model
        self.asked = asked or {}
        self.device = device_name(model.device)
        self.stop = stop_tokens(model)
        self._prompts: OrderedDict[tuple[object, ...], Ragged] = OrderedDict()
        self._copies: dict[object, arms.Copy] = {}

    @classmethod
    def load(
        cls, found: Found, format: str, device: torch.device, asked: Mapping[str, Arm] | None = None
    ) -> TransformersBackend:
        """MODEL, converted to the phase arm while it loads. Where weights nest by default, FP8 prompts read the plane
        here too, whose codes are not separate FP8's. Other formats have nothing of a nested weight: there the reference
        is the library's own BF16 product."""
        policy = arm_policy("phase", format)
        if format in ("nvfp4", "int8"):
            policy = replace(policy, storage="separate")
        return cls(load_model(found, policy, device), asked)

    def open(self, arm: str) -> TransformersEngine:
        policy: Policy = self.model.mixquant_policy
        return TransformersEngine(self, self.asked.get(arm) or standard(arm, policy.prefill, policy.tail))

    def copy(self, arm: Arm) -> arms.Copy | None:
        """The quantized kernels of an arm; None where they are those that the model was converted with."""
        key = _copy_key(arm, self.model)
        if key is None:
            return None
        if key not in self._copies:
            weights = PrefillWeights(arm.weights) if arm.weights else None
            self._copies[key] = arms.quantized_copy(self.model, arm.policy, weights)
        return self._copies[key]

    def read(self, kind: object, queries: Sequence[Query], masked: bool = False) -> Ragged:
        """The KV cache of all prompts but their last token; kept for the arms that read them the same way."""
        if masked:  # a control reads for itself
            return prefill(self.model, [query.ids[:-1] for query in queries], masked=True)
        key = (kind, *(tuple(query.ids) for query in queries))
        if key not in self._prompts:
            self._make_room(key)
            self._prompts[key] = prefill(self.model, [query.ids[:-1] for query in queries])
        self._prompts.move_to_end(key)
        return self._prompts[key]

    def _make_room(self, key: tuple[object, ...]) -> None:
        """Drop other batches' caches, and the oldest where the rest is too large."""
        batch = set(key[1:])
        for old in [old for old in self._prompts if not batch.intersection(old[1:])]:
            del self._prompts[old]
        room = self._room()
        while len(self._prompts) > 1 and self._kept > room:
            self._prompts.popitem(last=False)

    @property
    def _kept(self) -> int:
        """Bytes of the prompt caches."""
        return sum(state.nbytes for state in self._prompts.values())

    def _room(self) -> int:
        """What they may take: half of what is free or theirs, and no more than `KEPT_BYTES`."""
        device = self.model.device
        free = available_bytes(device)
        if free is None:
            return KEPT_BYTES
        if device.type == "cuda":  # torch keeps what was freed
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(KEPT_BYTES, (free + self._kept) // 2)


def _copy_key(arm: Arm, model: PreTrainedModel) -> tuple[object, ...] | None:
    """What tells an arm's quantized weights from others'; None for those that the model was converted with, whatever
    was ignored then: a folder may have left layers out."""
    if not any(arm.quantizes):
        return None
    loaded: Policy = model.mixquant_policy
    format = arm.policy.prefill if arm.quantizes[0] else arm.policy.decode
    key = format, arm.policy.scales, arm.policy.ignore, arm.weights
    return None if key == (loaded.prefill, loaded.scales, (), None) else key


class TransformersEngine:
    """One arm of a backend's model."""

    def __init__(self, backend: TransformersBackend, arm: Arm) -> None:
        if arm.policy.min_prompt:
            raise InputError(f"min_prompt={arm.policy.min_prompt} is for vLLM: leave it out, or use --engine vllm.")
        if arm.policy.storage not in ("auto", backend.model.mixquant_policy.storage):
            raise InputError(
                f"storage={arm.policy.storage} would load the model anew for one arm: leave it out, or use --engine "
                "vllm."
            )
        self.backend = backend
        self.arm = arm
        self.tail = arm.policy.tail if any(arm.quantizes) else 1
        self._shape = next(name for name, quantizes in ARMS.items() if quantizes == arm.quantizes)
        with arms.holding(backend.model, backend.copy(arm)):
            self.kernels, self.emulated = arms.kernels_in(backend.model, self._shape)
        self._last: dict[object, tuple[object, tuple[Tensor, Ragged]]] = {}  # the forced answers of the last batch

    def generate(self, queries: Sequence[Query], drafts: Sequence[TokenIds] | None = None) -> list[TokenIds]:
        drafts = [[] for _ in queries] if drafts is None else drafts
        with self._running():
            return [
                answer for part in self._parts(queries) for answer in self._write(part, queries[part], drafts[part])
            ]

    def score(self, queries: Sequence[Query], answers: Sequence[TokenIds]) -> list[Tensor]:
        with self._running():
            parts = [self._score(part, queries[part], answers[part]) for part in self._parts(queries)]
        return list(chain.from_iterable(parts))

    def close(self) -> None:
        self._last.clear()

    @contextmanager
    def _running(self) -> Iterator[None]:
        model = self.backend.model
        with arms.holding(model, self.backend.copy(self.arm)), arms.running(model, self._shape):
            yield

    def _parts(self, queries: Sequence[Query]) -> list[slice]:
        """The batches in which this arm runs a batch."""
        half = (len(queries) + 1) // 2
        whole = self.arm.of is None or len(queries) < 2
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
        """Tail, last prompt token and answer, each in its phase, after what the arm shares with others."""
        model = self.backend.model
        kind = _copy_key(self.arm, model) if self.arm.quantizes[0] else "precise"
        state = self.backend.read(kind, queries, masked=self.arm.of is not None)
        last = [[query.ids[-1]] for query in queries]
        if self.tail == 0:
            first, state = extend(model, state, last, prompt=True)
            rest, state = extend(model, state, answers)
            return torch.cat([first, rest], 1), state
        if self.tail > 1:
            _, state = extend(model, state.cut(self.tail - 1), [q.ids[-self.tail : -1] for q in queries], last=True)
        return extend(model, state, [[*token, *answer] for token, answer in zip(last, answers, strict=True)])

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
