"""The runner: arms take turns, what fails is named, and an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mixquant.bench.arms import EngineSpec, chosen, specs
from mixquant.bench.journal import Journal
from mixquant.bench.results import ratios
from mixquant.bench.runner import Runner, Running
from mixquant.bench.workloads import Prompts

from .scripted import Scripted

ARMS = chosen(["bf16", "vllm:fp8", "phase"], ["tail0=fp8,tail=0"], "fp8")
CASES = list(Prompts(alone=[20, 30], together=[], cached=[], rounds=3).cases())


class Engines:
    """Starts scripted engines. make: by their name in results; a text is why one does not start."""

    name = "scripted"

    def __init__(self, make: Callable[[EngineSpec], Any] = lambda spec: Scripted()) -> None:
        self.make = make
        self.started: list[dict[EngineSpec, Any]] = []

    def start(self, specs: Sequence[EngineSpec]) -> dict[EngineSpec, Running | str]:
        self.started.append({spec: self.make(spec) for spec in specs})
        return dict(self.started[-1])


def run(
    folder: Path,
    engines: Engines,
    said: list[str] | None = None,
    groups: Sequence[Sequence[EngineSpec]] = (specs(ARMS),),
    **more: Any,
) -> tuple[Runner, Journal]:
    with closing(Journal(folder / "bench.jsonl", {"rounds": 3})) as journal:
        tell = (said if said is not None else []).append
        runner = Runner("m", engines, ARMS, CASES, journal, tell, tell, lambda: None, **more)
        runner.run(groups)
        return runner, journal


def test_every_arm_has_a_row_in_every_case(tmp_path: Path) -> None:
    engines = Engines()
    runner, journal = run(tmp_path, engines)
    assert [(found.case, found.arm, len(found.ms)) for found in journal.rows.values()] == [
        (case, arm, 3) for case in ("20 tokens", "30 tokens") for arm in ("bf16", "vllm:fp8", "phase", "tail0")
    ]
    assert runner.missing == {}
    (started,) = engines.started
    assert len(started) == 3  # phase and tail0 are one engine
    assert all(engine.closed for engine in started.values())
    assert journal.engines["tail0"]["tail"] == 0
    tails = [set(engine.tails) for spec, engine in started.items()]
    assert tails == [set(), set(), {None, 0}]  # stock engines are not asked; without a word the default comes back


def test_arms_of_one_engine_send_other_tokens(tmp_path: Path) -> None:
    engines = Engines()
    run(tmp_path, engines)
    shared = engines.started[0][ARMS[2].spec]
    assert len(shared.sent) == 2 * 2 * 4  # two arms, two cases, three rounds and one that warms up
    assert len({tuple(ids) for ids in shared.sent}) == len(shared.sent)


def test_the_next_round_begins_with_the_next_arm(tmp_path: Path) -> None:
    order: list[str] = []

    class Noted(Scripted):
        def submit(self, ids: list[int], answer: int) -> str:
            order.append(self.label)  # type: ignore[attr-defined]
            return super().submit(ids, answer)

    def make(spec: EngineSpec) -> Scripted:
        engine = Noted()
        engine.label = spec.method or ("ours" if spec.policy else "bf16")  # type: ignore[attr-defined]
        return engine

    run(tmp_path, Engines(make))
    assert order[4:8] == ["bf16", "fp8", "ours", "ours"]
    assert order[8:12] == ["fp8", "ours", "ours", "bf16"]


def test_an_arm_that_does_not_start_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    runner, journal = run(tmp_path, Engines(lambda spec: "no kernel" if spec.method else Scripted()), said)
    assert runner.missing == {"vllm:fp8": "no kernel"}
    assert {found.arm for found in journal.rows.values()} == {"bf16", "phase", "tail0"}
    assert "vllm:fp8 does not run: no kernel" in said


def test_an_engine_that_dies_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    runner, journal = run(tmp_path, Engines(lambda spec: Scripted(dies_at=6 if spec.method else None)))
    assert "RuntimeError: the engine has died" in runner.missing["vllm:fp8"]
    assert sum(found.arm == "vllm:fp8" for found in journal.rows.values()) == 1  # what was measured is kept
    assert sum(found.arm == "bf16" for found in journal.rows.values()) == 2


def test_an_emulated_arm_has_no_time(tmp_path: Path) -> None:
    _, journal = run(tmp_path, Engines(lambda spec: Scripted(emulated=spec.policy is not None)))
    times = {found.arm: (found.ms, found.ttft_ms) for found in journal.rows.values()}
    assert times["phase"] == ([], None)
    assert times["bf16"][1] is not None


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Engines(lambda spec: _Interrupted()))
    _, journal = run(tmp_path, resumed := Engines())
    assert len(journal.rows) == 8
    assert {len(ids) for engine in resumed.started[0].values() for ids in engine.sent} == {30}
    run(tmp_path, complete := Engines())
    assert complete.started == []


class _Interrupted(Scripted):
    def submit(self, ids: list[int], answer: int) -> str:
        if len(ids) == 30:
            raise KeyboardInterrupt
        return super().submit(ids, answer)


def test_nor_where_memory_holds_other_engines_together_than_before(tmp_path: Path) -> None:
    bf16, stock, phase = specs(ARMS)
    _, journal = run(tmp_path, Engines(), groups=[[bf16, stock]])
    before = journal.rows
    _, journal = run(tmp_path, resumed := Engines(), groups=[[bf16, phase], [bf16, stock]])
    assert [set(started) for started in resumed.started] == [{bf16, phase}]
    assert before.items() <= journal.rows.items()  # stock keeps the bf16 that it took turns with
    added = {(row.session, row.arm) for place, row in journal.rows.items() if place not in before}
    assert added == {(1, "bf16"), (1, "phase"), (1, "tail0")}
    assert {ratio.of for ratio in ratios(journal.rows.values()) if ratio.arm == "phase"} == {"bf16", "vllm:fp8"}
    for groups in ([[bf16, stock, phase]], [[bf16, stock], [bf16, phase]]):
        run(tmp_path, complete := Engines(), groups=groups)
        assert not complete.started
    _, journal = run(tmp_path, alone := Engines(), groups=[[bf16, stock], [bf16, phase], [bf16]])
    assert [set(started) for started in alone.started] == [{bf16}]
    assert sum(row.arm == "bf16" for row in journal.rows.values()) == 3 * len(CASES)


def test_more_memory_starts_what_is_new_and_the_yardstick_alone(tmp_path: Path) -> None:
    bf16, stock, phase = specs(ARMS)
    run(tmp_path, Engines(), groups=[[bf16, stock]])
    _, journal = run(tmp_path, resumed := Engines(), groups=[[bf16, stock, phase]])
    assert [set(started) for started in resumed.started] == [{bf16, phase}]
    assert sum(row.arm == "vllm:fp8" for row in journal.rows.values()) == len(CASES)


def test_rounds_can_be_said(tmp_path: Path) -> None:
    _, journal = run(tmp_path, Engines(), rounds=1)
    assert {len(found.ms) for found in journal.rows.values()} == {1}


class _Small:
    """A device that holds so many engines at once. tries: how many were asked for at a time."""

    name = "scripted"

    def __init__(self, room: int) -> None:
        self.room = room
        self.tries: list[list[str]] = []

    def start(self, specs: Sequence[EngineSpec]) -> dict[EngineSpec, Running | str]:
        self.tries.append([spec.name.partition(":")[0] for spec in specs])
        kept = list(specs)[-self.room :]  # the first ones find no memory
        return {spec: Scripted() if spec in kept else "CUDA out of memory" for spec in specs}


OURS = "vllm with mixquant"


def test_what_finds_no_memory_comes_later_and_has_a_yardstick(tmp_path: Path) -> None:
    small = _Small(room=2)
    runner, journal = run(tmp_path, small)  # type: ignore[arg-type]
    assert small.tries == [["vllm", "vllm --quantization fp8", OURS], ["vllm"]]
    assert runner.missing == {}
    rows = {(found.session, found.arm) for found in journal.rows.values()}
    assert rows == {(0, "vllm:fp8"), (0, "phase"), (0, "tail0"), (1, "bf16")}
    assert {ratio.of for ratio in ratios(journal.rows.values()) if ratio.arm == "phase"} == {"bf16", "vllm:fp8"}
    run(tmp_path, complete := Engines())
    assert complete.started == []


def test_one_engine_at_a_time_where_no_two_start_together(tmp_path: Path) -> None:
    small = _Small(room=1)
    runner, journal = run(tmp_path, small)  # type: ignore[arg-type]
    stock = "vllm --quantization fp8"
    assert small.tries == [["vllm", stock, OURS], ["vllm"], ["vllm", stock], ["vllm"]]
    assert runner.missing == {}
    assert {(found.session, found.arm) for found in journal.rows.values()} >= {
        (1, "bf16"),
        (2, "vllm:fp8"),
        (3, "bf16"),
    }


def test_what_starts_not_even_alone_is_missing(tmp_path: Path) -> None:
    engines = Engines(lambda spec: "no memory" if spec.method else Scripted())
    runner, _ = run(tmp_path, engines)
    assert [len(started) for started in engines.started] == [3, 2, 1]
    assert runner.missing == {"vllm:fp8": "no memory"}
