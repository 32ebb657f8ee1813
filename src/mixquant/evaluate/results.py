"""The results of an evaluation: the one document that `mixquant eval` writes and `mixquant report` reads, typed.

    results = read(Path("results.json"))          # mixquant.evaluate.reading
    results.arms["phase"].divergence.kld_mean
    results.to_json()                             # what was read, key by key

Field names are the keys of the file, in its order; other tools rely on them. A figure is rounded to six digits, far
below its error, and null where it is no finite number. Types are strict: true is no number, "3" neither. A key that may
be missing has a default, and is written only if it was set; a key that this release does not know is kept and ignored.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from mixquant.policy import REFERENCE

VERSION: Literal[2] = 2
"""Of the files that this release writes and reads."""


def _rounded(value: Any) -> Any:
    """Floats to six digits, None where they are not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") + 0.0 if math.isfinite(value) else None  # + 0.0: no minus zero


GREATEST = 2**53
"""What no figure of a whole file exceeds; more would only break those who print it."""

_Float = Annotated[float, Field(ge=-GREATEST, le=GREATEST)]
Number = Annotated[_Float, BeforeValidator(_rounded)]
Figure = Annotated[_Float | None, BeforeValidator(_rounded)]
Share = Annotated[Annotated[float, Field(ge=0, le=1)], BeforeValidator(_rounded)]
Error = Annotated[Annotated[float, Field(ge=0, le=GREATEST)] | None, BeforeValidator(_rounded)]
"""A standard error; None for fewer than two examples."""
Count = Annotated[int, Field(ge=0, le=GREATEST)]
Some = Annotated[int, Field(ge=1, le=GREATEST)]
Interval = tuple[Figure, Figure]


class Strict(BaseModel):
    """A part of a document, for `mixquant.bench.results` too."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")


class Model(Strict):
    """hash: fingerprint of its weights; None where they are on a server."""

    name: str
    hash: str | None = None


class Kernels(Strict):
    """Names of the kernels that ran in each phase; none where the engine cannot know."""

    prefill: list[str]
    decode: list[str]


class Flips(Strict):
    """Examples whose correctness is not the reference's."""

    right_to_wrong: Count
    wrong_to_right: Count


class Score(Strict):
    """Accuracy over examples, and what has changed of it since the reference. seeds: accuracy of each data seed."""

    accuracy: Share
    se: Error
    n: Some
    recovery: Figure
    recovery_se: Error
    flips: Flips
    mcnemar_p: Figure
    seeds: dict[str, Number]


class Rung(Strict):
    """One rung of a task's ladder: accuracy with Wilson's interval, divergence with its standard error."""

    rung: int
    label: str
    prompt_tokens: Annotated[float, Field(ge=0, le=GREATEST)]
    n: Some
    accuracy: Share
    low: Share
    high: Share
    kld_mean: Figure
    kld_se: Error
    right_to_wrong: Count
    wrong_to_right: Count
    nearly: Share | None = None


class Task(Score):
    """nearly: by the easier reading of its answers, where there is one."""

    rungs: Annotated[list[Rung], Field(min_length=1)]
    nearly: Score | None = None


class _Range(Strict):
    """Divergence between two places, start included and stop not."""

    start: Count
    stop: Count
    kld_mean: Figure
    kld_se: Error


class Bin(_Range):
    """Of prompt lengths."""

    examples: Count


class Position(_Range):
    """Of positions in the answer, with the share of tokens whose most likely one is another."""

    flip_rate: Figure
    flip_rate_se: Error
    examples: Count


class Growth(Strict):
    """Divergence of the second half of the first `tokens` tokens of an answer over that of the first half.

    rises: share of the answers in which the second half's is larger; p: of the sign test that this is one half.
    """

    tokens: Some
    examples: Count
    ratio: Figure
    ratio_se: Error
    rises: Figure = None
    p: Figure = None


class Layer(Strict):
    """What quantizing one layer alone does."""

    layer: str
    kld_mean: Figure
    kld_se: Error
    sqnr_db: Figure


class Intervals(Strict):
    """95 % intervals of quantiles; an end of the first divergence that is None is never."""

    kld_median: Interval | None = None
    kld_p90: Interval | None = None
    kld_p99: Interval | None = None
    kld_p999: Interval | None = None
    first_divergence_median: Interval | None


class Divergence(Strict):
    """How far one arm's answers are from the reference's (`mixquant.evaluate.distance`)."""

    kld_mean: Figure
    kld_se: Error
    kld_median: Figure
    kld_p90: Figure
    kld_p99: Figure
    kld_p999: Figure
    kld_max: Figure
    same_top1: Figure
    same_top1_se: Error
    positions: Count
    examples: Count
    quantiles: list[tuple[Number, Number]]
    identical: Figure
    identical_se: Error
    first_divergence_median: Figure
    length_ratio: Figure
    length_ratio_se: Error
    survival: list[tuple[Count, Number]]
    intervals: Intervals
    by_position: list[Position]
    growth: Growth | None
    by_context: list[Bin]
    by_layer: list[Layer] | None = None


class Setting(Strict):
    """An arm's policy (`mixquant.policy.Policy`). weights: the folder of its quantized weights, if it names one."""

    prefill: str
    decode: str
    tail: Count
    weights: str | None = None


class Redraw(Strict):
    """An arm against its own control: the same arithmetic in another order of rounding, another draw of its error.

    kld_mean: KL(arm || control). share: how much of the arm's divergence from the reference is chance of the draw, half
    of kld_mean over it: to second order, two draws are twice as far apart as one is from their mean. shift: the
    control's divergence from the reference minus the arm's.
    """

    kld_mean: Figure
    kld_se: Error
    share: Figure
    share_se: Error
    shift: Figure
    shift_se: Error


class Arm(Strict):
    """divergence: None for the reference. nearly: by the tasks' easier reading, where they have one."""

    emulated: bool
    kernels: Kernels
    divergence: Divergence | None
    tasks: Annotated[dict[str, Task], Field(min_length=1)]
    all: Score
    nearly: Score | None = None
    policy: Setting | None = None
    redraw: Redraw | None = None


class Judged(Strict):
    """One arm minus another (`mixquant.evaluate.comparison`), and what it amounts to (`mixquant.evaluate.verdict`).

    margin: the loss of accuracy that is too small to matter.
    """

    arm: str
    against: str
    margin: Number
    n: Some
    accuracy_difference: Number
    low: Number
    high: Number
    right_to_wrong: Count
    wrong_to_right: Count
    mcnemar_p: Number
    kld_difference: Figure
    kld_low: Figure
    kld_high: Figure
    kld_further: Figure
    kld_p: Figure
    mcnemar_p_holm: Number
    kld_p_holm: Figure
    different: bool
    kind: str
    examples_needed: int | None


class Ratio(Strict):
    """How many times further from the reference `uniform` is than an arm, at positions of the answer."""

    start: Count
    stop: Count
    ratio: Figure
    low: Figure
    high: Figure


class Along(Strict):
    """An arm beside `uniform` along the answer, over the answers that have the first `tokens` tokens.

    nears: share of the answers in which the arm's part of uniform's divergence is smaller in the second half of these
    tokens than in the first; p: of the sign test that this is one half.
    """

    tokens: Some
    examples: Count
    nears: Figure
    p: Figure
    ratios: list[Ratio]


class NoiseFloor(Strict):
    """How far the reference is from itself in another batch composition; none where no batch had another."""

    accuracy: Figure
    flips: Figure
    kld_mean: Figure
    kld_p99: Figure
    same_top1: Figure
    identical: Figure


class Verdict(Strict):
    """The answer in sentences; outcome: in one word, None where an arm is missing."""

    sentence: str
    outcome: str | None
    phase: str | None
    uniform: str | None
    phase_against_uniform: str | None
    details: list[str]


class Lengths(Strict):
    """Prompt lengths in tokens."""

    min: Count
    median: Number
    max: Count


YEAR_9999 = 253370764800
"""Its beginning, in seconds since 1970; later dates Python does not know."""


class Time(Strict):
    """seconds: by arm. started: seconds since 1970, None where many runs were merged."""

    seconds: dict[str, float]
    total_seconds: Annotated[float, Field(ge=0, le=GREATEST)]
    started: Annotated[float, Field(ge=0, lt=YEAR_9999)] | None


class Flipped(Strict):
    """An answer whose correctness is not the reference's, to be read; long texts are cut. prompt: None if not kept."""

    arm: str
    task: str
    rung: int
    seed: Count
    index: Count
    label: str
    right_to_wrong: bool
    prompt: str | None
    reference: str
    answer: str


class Results(Strict):
    """The whole document."""

    version: Literal[2]
    mixquant: str
    commit: str | None = None
    model: Model
    engine: str
    device: str
    versions: dict[str, str]
    threads: Count
    format: str
    tail: Count
    seeds: list[Count]
    limit: int | None
    max_prompt_tokens: int | None = None
    batch_size: int | None = None
    suites: list[str]
    examples: dict[str, str] = {}
    servers: dict[str, Any] | None = None
    command: str
    notes: list[str] = []
    alpha: float
    margin: Number
    prompt_tokens: Lengths
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    comparisons: list[Judged]
    noise_floor: NoiseFloor | None
    along: dict[str, Along] = {}
    flipped: list[Flipped] = []
    verdict: Verdict
    time: Time | None = None

    @property
    def software(self) -> str:
        """What ran: mixquant's version, and the commit where it ran from a checkout."""
        return f"mixquant {self.mixquant}" + (f", commit {self.commit}" if self.commit else "")

    @property
    def reference(self) -> Arm:
        return self.arms[REFERENCE]

    def to_dict(self) -> dict[str, Any]:
        """JSON values, with the keys that were set."""
        return self.model_dump(mode="json", exclude_unset=True)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
