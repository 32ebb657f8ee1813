"""The criterion: same tokens, log-probabilities to 1e-5; in at most one request of eight, one flipped code instead."""

from __future__ import annotations

from dataclasses import dataclass

from tests.integrations.vllm.engines import greatest_difference
from tests.integrations.vllm.replay import Difference, first_difference
from tests.integrations.vllm.scenarios import Run


@dataclass(frozen=True)
class Comparison:
    """Two runs of the same prompts.

    difference: greatest of log-probabilities, over the equal requests.
    equal_tokens, tokens: how many tokens are the same, of how many.
    traced: for each request (by prompt length) that is not equal, where its difference begins.
    """

    difference: float
    equal_tokens: int
    tokens: int
    traced: dict[int, Difference | None]
    requests: int

    @property
    def is_equal(self) -> bool:
        flips = [trace for trace in self.traced.values() if trace is not None and trace.is_one_flip]
        return len(flips) == len(self.traced) and 8 * len(flips) <= self.requests

    def figures(self) -> dict[str, float]:
        """What a table shows of it: plain numbers, which also pass from one test process to another."""
        flips = len(self.traced)
        return {
            "equal": self.equal_tokens, "tokens": self.tokens, "difference": float(self.difference), "flips": flips
        }  # fmt: skip


def compare(ours: Run, expected: Run, exact: float) -> Comparison:
    """Compare request by request; requests are equal if their tokens are, and log-probabilities to `exact`."""
    worst, equal_tokens, tokens, traced = 0.0, 0, 0, {}
    for length, one, other in zip(ours.scenario.lengths, ours.answers, expected.answers, strict=True):
        difference = greatest_difference(one, other)
        tokens += len(one.tokens)
        equal_tokens += sum(a == b for a, b in zip(one.tokens, other.tokens, strict=True))
        if one.tokens == other.tokens and difference <= exact:
            worst = max(worst, difference)
        else:
            traced[length] = _trace(ours, expected, length)
    return Comparison(
        worst, equal_tokens, sum(len(answer.tokens) for answer in ours.answers), traced, len(ours.answers)
    )


def contrast(ours: Run, control: Run) -> float:
    """Greatest difference from a run that must differ."""
    return max(map(greatest_difference, ours.answers, control.answers))


def _trace(ours: Run, expected: Run, length: int) -> Difference | None:
    """None where nothing was recorded, or where all NVFP4 codes are the same."""
    one, other = ours.layer_inputs(length), expected.layer_inputs(length)
    return first_difference(one, other, ours.scenario.tail) if one and other else None
