"""What a turn measures, on an engine whose every millisecond is known."""

from __future__ import annotations

import pytest

from mixquant.bench.play import Sample, play
from mixquant.bench.workloads import Agent, Case, Decode, Prompts, Workload
from mixquant.errors import InputError

from .scripted import Scripted


def played(case: Case, engine: Scripted | None = None, seed: object = 0, short: bool = False) -> Sample:
    engine = engine or Scripted()
    return play(case, engine, seed, short, engine.clock)


def only(spec: Workload) -> Case:
    (case,) = spec.cases()
    return case


def test_a_prompt_alone_takes_its_tokens_and_a_step() -> None:
    sample = played(only(Prompts(alone=[90], together=[], cached=[])))
    assert sample.ms == pytest.approx(100)
    assert sample.first_ms == pytest.approx([100])
    assert sample.hit_rate == 0


def test_prompts_at_once_are_timed_each_and_together() -> None:
    engine = Scripted()
    sample = played(only(Prompts(alone=[], together=[90], requests=3, cached=[])), engine)
    assert sample.ms == pytest.approx(280)
    assert sample.first_ms == pytest.approx([280] * 3)
    assert len({tuple(ids) for ids in engine.sent}) == 3


def test_a_short_turn_pays_for_its_new_tokens_only() -> None:
    engine = Scripted()
    sample = played(only(Prompts(alone=[], together=[], cached=[2000], new=[40])), engine)
    assert sample.ms == pytest.approx(50)
    assert sample.hit_rate == pytest.approx(2000 / 2040)
    assert [len(ids) for ids in engine.sent] == [2000, 2040]


def test_a_prefix_that_is_not_cached_is_no_figure() -> None:
    class Forgetful(Scripted):
        def step(self):  # type: ignore[no-untyped-def]
            outputs = super().step()
            self.forget()
            return outputs

    with pytest.raises(InputError, match=r"Only 0 of 2,000 tokens were cached"):
        played(only(Prompts(alone=[], together=[], cached=[2000], new=[40])), Forgetful())


def test_other_turns_send_other_tokens_and_the_same_turn_the_same() -> None:
    case, engine = only(Prompts(alone=[30], together=[], cached=[])), Scripted()
    for seed in ("a", "b", "a"):
        played(case, engine, seed)
    assert engine.sent[0] == engine.sent[2] != engine.sent[1]


def test_a_decode_step_is_timed_while_all_of_them_write() -> None:
    sample = played(only(Decode(batches=[4], behind=50, steps=6, reading=0)))
    assert sample.ms == sample.step_ms == pytest.approx(10)
    assert sample.written == 4 * 7


def test_neighbours_wait_while_a_prompt_is_read() -> None:
    sample = played(only(Decode(batches=[], behind=50, steps=6, reading=200, neighbours=[2])))
    assert sample.ms == pytest.approx(210)
    assert sample.first_ms == pytest.approx([210])


def test_conversations_go_on_turn_by_turn() -> None:
    spec = Agent(conversations=2, turns=3, agents=1, system=(100, 100), tool=(20, 20), answer=(5, 5))
    engine = Scripted()
    sample = played(only(spec), engine)
    assert [len(ids) for ids in engine.sent] == [120, 120, 145, 145, 170, 170]
    assert engine.answers == [5] * 6
    for before, after in zip(engine.sent[:4], engine.sent[2:], strict=True):
        assert after[: len(before) + 5] == [*before, 1, 2, 3, 4, 5]  # the answer itself is what the next turn reads
    assert engine.sent[0][:100] == engine.sent[1][:100]  # one agent's system prompt
    assert len(sample.first_ms) == 6
    assert len(sample.later_ms) == 4
    assert sample.later_ms == pytest.approx([50] * 4)  # two tool results of 20 tokens and a step
    assert sample.step_ms == pytest.approx(10)
    assert sample.hit_rate == pytest.approx((2 * 125 + 2 * 150) / sum(map(len, engine.sent)))
    assert sample.ms == pytest.approx(1e3 * engine.now)


def test_conversations_begin_with_an_empty_cache_and_equal_words() -> None:
    case, engine = only(Agent(conversations=2, turns=2, system=(50, 60), tool=(5, 9), answer=(2, 3))), Scripted()
    first, second = played(case, engine), played(case, engine)
    half = len(engine.sent) // 2
    assert engine.sent[:half] == engine.sent[half:]
    assert first.hit_rate == second.hit_rate


def test_warming_up_is_one_conversation() -> None:
    engine = Scripted()
    played(only(Agent(conversations=4, turns=2, system=(50, 60), tool=(5, 9), answer=(2, 3))), engine, short=True)
    assert len(engine.sent) == 2
