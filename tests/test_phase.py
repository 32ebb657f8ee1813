"""The phase rule, case by case, and the plan against a token-by-token oracle."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.phase import DECODE_ONLY, WHOLE_PROMPT, Phase, Plan, Run, count_rows, plan, prefill_rows, reads_precisely
from tests.formats.inputs import quick

PREFILL, DECODE = Phase.PREFILL, Phase.DECODE

CASES = {
    # what                                    prompt_len, computed, scheduled, tail: leading rows in prefill
    "a prompt, whole, but its last token": (100, 0, 100, 1, 99),
    "a prompt chunk": (100, 0, 64, 1, 64),
    "a prompt chunk of one row": (100, 64, 1, 1, 1),
    "the last prompt token alone": (100, 99, 1, 1, 0),
    "the last chunk": (100, 64, 36, 1, 35),
    "a generated token": (100, 100, 1, 1, 0),
    "drafts under verification": (100, 120, 5, 1, 0),
    "prompt and generated tokens recomputed after preemption": (100, 0, 120, 1, 99),
    "a chunk of only generated tokens recomputed after preemption": (100, 104, 16, 1, 0),
    "a tool result on a long cached prefix": (9000, 8700, 300, 1, 299),
    "a prefix-cache hit on all but the last block": (100, 96, 4, 1, 3),
    "a prefix-cache hit on all but the last token": (100, 99, 1, 1, 0),
    "an answer forced into a prompt, its length not said": (160, 0, 160, 1, 159),
    "an answer forced into a prompt, its length said": (100, 0, 160, 1, 99),
    "no tail: the whole prompt": (100, 0, 100, 0, 100),
    "no tail: the last prompt token": (100, 99, 1, 0, 1),
    "no tail: a generated token": (100, 100, 1, 0, 0),
    "a tail of 16": (100, 0, 100, 16, 84),
    "a chunk inside the tail": (100, 90, 10, 16, 0),
    "a tail longer than the prompt": (100, 0, 100, 200, 0),
    "a prompt of one token": (1, 0, 1, 1, 0),
    "nothing scheduled": (100, 50, 0, 1, 0),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_rule(case: tuple[int, int, int, int, int]) -> None:
    *numbers, prefill = case
    assert prefill_rows(*numbers) == prefill


def phases(of: Plan) -> list[Phase]:
    return [run.phase for run in of.runs for _ in range(run.start, run.stop)]


def token_by_token(prompt_lens: list[int], computed: list[int], scheduled: list[int], tail: int) -> list[Phase]:
    """The rule as it is said, for one token after another."""
    return [
        PREFILL if position < prompt_len - tail else DECODE
        for prompt_len, done, count in zip(prompt_lens, computed, scheduled, strict=True)
        for position in range(done, done + count)
    ]


Batch = tuple[list[int], list[int], list[int]]

sequences = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 16), st.integers(0, 9)), max_size=6)
batches = sequences.map(lambda rows: tuple([row[i] for row in rows] for i in range(3)))
"""(prompt_lens, computed, scheduled) of up to six sequences."""


@quick
@given(batches, st.integers(0, 4))
def test_a_plan_gives_every_token_its_phase(batch: Batch, tail: int) -> None:
    made, expected = plan(*batch, tail), token_by_token(*batch, tail)
    assert phases(made) == expected
    assert made.rows == len(expected)
    assert made.decode_rows == [row for row, phase in enumerate(expected) if phase is DECODE]
    assert made.only == (expected[0] if len(set(expected)) == 1 else None if expected else DECODE)


@quick
@given(batches, st.integers(0, 4))
def test_runs_are_maximal_ordered_and_without_gaps(batch: Batch, tail: int) -> None:
    runs = plan(*batch, tail).runs
    assert all(run.start < run.stop for run in runs)
    assert all(before.stop == after.start for before, after in pairwise(runs))
    assert all(before.phase is not after.phase for before, after in pairwise(runs))
    assert not runs or runs[0].start == 0


@quick
@given(batches, st.integers(0, 4))
def test_the_span_is_the_smallest_range_with_every_prefill_row(batch: Batch, tail: int) -> None:
    made = plan(*batch, tail)
    prefill = [row for row, phase in enumerate(phases(made)) if phase is PREFILL]
    assert made.span == ((prefill[0], prefill[-1] + 1) if prefill else (0, 0))


@quick
@given(batches, st.integers(0, 4))
def test_rows_are_counted_by_phase(batch: Batch, tail: int) -> None:
    expected, in_prompts = token_by_token(*batch, tail), token_by_token(*batch, 0)
    counts = count_rows(*batch, tail)
    assert (counts.prefill, counts.decode) == (expected.count(PREFILL), expected.count(DECODE))
    assert counts.tail == in_prompts.count(PREFILL) - counts.prefill
    assert counts.mixed == (plan(*batch, tail).only is None)


requests = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 16), st.integers(0, 9), st.booleans()), max_size=6)


@quick
@given(requests, st.integers(0, 4))
def test_a_request_that_is_read_precisely_is_all_tail(batch: list[tuple[int, int, int, bool]], tail: int) -> None:
    """Whatever stands beside it, whose tokens keep their phases."""
    *numbers, precise = ([row[i] for row in batch] for i in range(4))
    tails = [WHOLE_PROMPT if each else tail for each in precise]
    expected = [
        phase
        for row, each in zip(batch, precise, strict=True)
        for phase in ([DECODE] * row[2] if each else token_by_token(*([number] for number in row[:3]), tail))
    ]
    assert phases(plan(*numbers, tails)) == expected
    counts, in_prompts = count_rows(*numbers, tails), token_by_token(*numbers, 0).count(PREFILL)
    assert (counts.prefill, counts.decode) == (expected.count(PREFILL), expected.count(DECODE))
    assert counts.tail == in_prompts - counts.prefill  # its prompt tokens, too, are told from its answer's


@pytest.mark.parametrize(
    ("prompt_len", "computed", "min_prompt", "precise"),
    [(23, 0, 24, True), (24, 0, 24, False), (9023, 9000, 24, True), (9024, 9000, 24, False), (1, 0, 0, False)],
)
def test_what_is_new_counts_and_not_what_is_cached(
    prompt_len: int, computed: int, min_prompt: int, precise: bool
) -> None:
    assert reads_precisely(prompt_len, computed, min_prompt) is precise


def test_a_batch_of_everything() -> None:
    """A decode row, the end of a prompt, a chunk of one and a draft of three, with their sequences in this order."""
    made = plan([10, 8, 20, 4], [15, 5, 3, 9], [1, 3, 1, 3], tail=1)
    assert made.runs == (
        Run(0, 1, DECODE), Run(1, 3, PREFILL), Run(3, 4, DECODE), Run(4, 5, PREFILL), Run(5, 8, DECODE),
    )  # fmt: skip
    assert made.span == (1, 5)
    assert made.decode_rows == [0, 3, 5, 6, 7]
    assert made.only is None
    counts = count_rows([10, 8, 20, 4], [15, 5, 3, 9], [1, 3, 1, 3], tail=1)
    assert (counts.prefill, counts.decode, counts.tail) == (3, 5, 1)


def test_runs_of_neighbouring_sequences_merge() -> None:
    assert plan([9, 9], [0, 0], [4, 4], tail=1).runs == (Run(0, 8, PREFILL),)
    assert plan([9, 9], [9, 9], [4, 4], tail=1).runs == (Run(0, 8, DECODE),)


def test_control_the_oracle_sees_another_tail() -> None:
    batch = [6, 4], [0, 0], [6, 4]
    assert phases(plan(*batch, tail=1)) != token_by_token(*batch, tail=0)
    assert phases(plan(*batch, tail=1)) != phases(plan(*batch, tail=2))


def test_decode_only_and_an_empty_batch_are_decode_without_rows() -> None:
    for empty in (DECODE_ONLY, plan([], [], [], tail=1)):
        assert (empty.only, empty.rows, empty.span, empty.decode_rows) == (DECODE, 0, (0, 0), [])


def test_every_sequence_needs_all_three_numbers() -> None:
    with pytest.raises(ValueError, match="shorter"):
        plan([10, 10], [0, 0], [4], tail=1)
    with pytest.raises(ValueError, match="shorter"):
        plan([10, 10], [0, 0], [4, 4], [1])
