"""What evaluation asks of an inference engine: greedy answers, and logits at answers that are forced on it.

A *backend* is a model in one of the engines we know (Transformers, vLLM, a server); it opens one *engine* for each arm.
Both are small protocols: everything above them is the same for all engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mixquant.prompts import Prompt

TokenIds = list[int]


@dataclass(frozen=True, slots=True)
class Query:
    """One prompt, and how long its answer may become.

    prompt: text, or a chat. ids: the prompt as the model reads it. limit: longest answer in tokens, the
    end-of-turn token included.
    """

    prompt: Prompt
    ids: TokenIds
    limit: int


class Engine(Protocol):
    """One model in one arm.

    kernels: names of the kernels that run in each phase, {"prefill": [...], "decode": [...]}; empty lists where the
    engine cannot know (a server). emulated: whether one of them is emulated, so that no time may be shown.
    """

    kernels: dict[str, list[str]]
    emulated: bool

    def generate(self, queries: Sequence[Query], drafts: Sequence[TokenIds] | None = None) -> list[TokenIds]:
        """Greedy answers, each up to and including its end-of-turn token or to its limit.

        drafts: a guess at each answer. It may save time and never changes what is written, beyond the rounding of a
        product over several rows instead of one.
        """
        ...

    def score(self, queries: Sequence[Query], answers: Sequence[TokenIds]) -> list[Tensor]:
        """Logits that predict each token of the given answers, which run as decode: [answer length, vocabulary] each.

        Raises InputError where the engine cannot force tokens (a server).
        """
        ...

    def close(self) -> None:
        """Free what the arm holds."""
        ...


class Backend(Protocol):
    """A model in an inference engine, ready to open arms (`mixquant.policy.ARMS`).

    together: whether all arms can be open at the same time; otherwise one is closed before the next is opened.
    forces: whether its engines can `score`.
    """

    name: str
    device: str
    together: bool
    forces: bool

    def open(self, arm: str) -> Engine:
        """The engine of an arm; InputError where the arm cannot run here."""
        ...
