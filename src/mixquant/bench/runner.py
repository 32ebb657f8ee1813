"""Takes every case with every arm, turn by turn, so that all see the same clocks. What fails is named, and the
rest goes on.

Within a round the arms follow each other, one request (or one batch, or one set of conversations) each; the next round
begins with the next arm. The first round warms up and does not count. Arms of one engine send other tokens, so that
none finds another's in the prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from mixquant.bench import ceiling
from mixquant.bench.arms import Arm, EngineSpec
from mixquant.bench.journal import Journal
from mixquant.bench.play import Sample
from mixquant.bench.results import Row, times
from mixquant.bench.workloads import Case


class Running(Protocol):
    """An engine that waits. facts: `kernels`, `emulated`, and whatever else is known, as JSON."""

    facts: dict[str, Any]

    def turn(self, case: Case, seed: object, short: bool = False) -> Sample:
        """Play one case once (`play.play`)."""
        ...

    def switch(self, tail: int | None) -> None:
        """Set the tail of the requests that follow; None: the engine's default. Stock engines are not asked."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class Backend(Protocol):
    """Starts engines."""

    @property
    def name(self) -> str: ...

    def start(self, specs: Sequence[EngineSpec]) -> dict[EngineSpec, Running | str]:
        """Engines that are resident together, each running, or why it does not start."""
        ...


@dataclass
class Runner:
    """A benchmark's work. advance: told what is being done. say: told figures, and what fails. save: called when there
    are new rows."""

    model: str
    backend: Backend
    arms: Sequence[Arm]
    cases: Sequence[Case]
    journal: Journal
    advance: Callable[[str], None]
    say: Callable[[str], None]
    save: Callable[[], object]
    rounds: int | None = None

    @property
    def missing(self) -> Mapping[str, str]:
        """Arms that do not run, or not any further, with the reason."""
        return self.journal.missing

    def run(self, groups: Sequence[Sequence[EngineSpec]]) -> None:
        """Session by session; those whose rows are all in the journal start no engine.

        What finds no memory beside others is started again: with the yardstick, and if need be alone.
        """
        queue, taken = list(groups), set[int]()
        for group in queue:  # which grows meanwhile
            session = self._number(group, taken)
            taken.add(session)
            here = self._here(session, group)
            arms = [arm for arm in here if any(arm in self._todo(session, case, here) for case in self.cases)]
            if arms:
                self.say(f"starting {', '.join(dict.fromkeys(arm.spec.name for arm in arms))}")
                self._session(session, arms, self.backend.start(list(dict.fromkeys(arm.spec for arm in arms))))
            queue += self._again(session, group)

    def _number(self, group: Sequence[EngineSpec], taken: AbstractSet[int]) -> int:
        """The session of these engines: that of the interrupted run, if it had one, so that rows stay beside those that
        they are compared with; else a new one."""
        arms = [arm.name for arm in self.arms if arm.spec in group]
        same = (number for number, found in enumerate(self.journal.sessions) if found == arms and number not in taken)
        found = next(same, None)
        return self.journal.begin(arms) if found is None else found

    def _here(self, session: int, group: Sequence[EngineSpec]) -> list[Arm]:
        """The arms of a session that run."""
        out = {name for number, name in self.journal.later if number == session} | self.missing.keys()
        return [arm for arm in self.arms if arm.spec in group and arm.name not in out]

    def _again(self, session: int, group: Sequence[EngineSpec]) -> list[list[EngineSpec]]:
        """Sessions for what a session had no memory for."""
        yardstick = self.arms[0].spec
        late = dict.fromkeys(arm.spec for arm in self.arms if (session, arm.name) in self.journal.later)
        return [[spec] if spec == yardstick or len(group) == 2 else [yardstick, spec] for spec in late]

    def _todo(self, session: int, case: Case, arms: Sequence[Arm]) -> list[Arm]:
        """The arms of a session that are to take a case: all, if one has no row yet, since turns are compared side by
        side. What another session has measured stays there (an interrupted run may have had more memory, or less), but
        the yardstick is beside whatever is new."""
        same = (case.spec.workload, case.name)
        rows = [row for row in self.journal.rows.values() if (row.workload, row.case) == same]
        done, elsewhere = ({row.arm for row in rows if (row.session == session) is here} for here in (True, False))
        others = [arm for arm in arms if arm.spec != self.arms[0].spec]
        new = [arm for arm in others if arm.name not in elsewhere]
        if others and not new:
            return []
        taking = [arm for arm in arms if arm in new or arm not in others]
        return [] if done.issuperset(arm.name for arm in taking) else taking

    def _session(self, session: int, arms: Sequence[Arm], started: Mapping[EngineSpec, Running | str]) -> None:
        engines = {spec: engine for spec, engine in started.items() if not isinstance(engine, str)}
        try:
            for arm in arms:
                if not isinstance(reason := started[arm.spec], str):
                    self.journal.note(arm.name, reason.facts | arm.to_dict())
                elif len(started) > 1 and "memory" in reason.lower():
                    self.journal.defer(session, arm.name)
                    self.say(f"{arm.name} finds no memory beside the others and comes later: {reason}")
                else:
                    self.drop(arm, reason)
            for case in self.cases:
                here = self._here(session, list(engines))
                if taking := self._todo(session, case, here):
                    self._case(session, case, taking, engines)
        finally:
            with ThreadPoolExecutor(max(len(engines), 1)) as pool:  # each waits for its processes to end
                list(pool.map(lambda engine: engine.close(), engines.values()))

    def drop(self, arm: Arm, reason: str) -> None:
        self.journal.drop(arm.name, reason)
        self.say(f"{arm.name} does not run: {reason}")

    def _case(self, session: int, case: Case, arms: Sequence[Arm], engines: Mapping[EngineSpec, Running]) -> None:
        samples: dict[str, list[Sample]] = {arm.name: [] for arm in arms}
        for turn in range(-1, self.rounds or case.rounds):
            self.advance(f"{case.spec.workload}, {case.name}: {'warming up' if turn < 0 else f'round {turn + 1}'}")
            for arm in _from(arms, turn):
                engine = engines[arm.spec]
                if arm.name in self.missing or (engine.facts["emulated"] and turn >= 0):
                    continue
                try:
                    stock = arm.spec.policy is None
                    if not stock:
                        engine.switch(arm.tail)
                    own = "" if stock else arm.name  # arms of one engine share a prefix cache
                    sample = engine.turn(case, (turn, own), short=turn < 0)
                except Exception as error:  # of an engine that has died, or runs out of something
                    self.drop(arm, f"{case.name}: {type(error).__name__}: {str(error).strip()[:300]}")
                    continue
                if turn >= 0:
                    samples[arm.name].append(sample)
        for arm in arms:
            if arm.name not in self.missing:
                row = self._row(session, case, arm, engines[arm.spec].facts, samples[arm.name])
                self.journal.add(row)
                self.say(said(row))
        self.save()

    def _row(self, session: int, case: Case, arm: Arm, facts: Mapping[str, Any], samples: Sequence[Sample]) -> Row:
        seconds = sum(sample.ms for sample in samples) / 1e3
        writes = case.spec.workload in ("agent", "serve")
        steps = sorted(sample.step_ms for sample in samples if sample.step_ms is not None)
        hits = [sample.hit_rate for sample in samples if sample.hit_rate is not None]
        row = Row(
            workload=case.spec.workload,
            case=case.name,
            arm=arm.name,
            engine=self.backend.name,
            model=self.model,
            isl=case.isl,
            cached=case.cached,
            new=case.new,
            batch=case.batch,
            ms=[sample.ms for sample in samples],
            ttft_ms=times([ms for sample in samples for ms in sample.first_ms]),
            later_ttft_ms=times([ms for sample in samples for ms in sample.later_ms]),
            step_ms=steps[len(steps) // 2] if steps else None,
            tokens_per_s=sum(sample.written for sample in samples) / seconds if writes and seconds else None,
            hit_rate=sum(hits) / len(hits) if hits else None,
            kernels=facts["kernels"],
            emulated=facts["emulated"],
            session=session,
        )
        return ceiling.beside(row, case, arm, facts)


def _from(arms: Sequence[Arm], turn: int) -> list[Arm]:
    """All arms, beginning with another one in each round."""
    first = turn % len(arms) if arms else 0
    return [*arms[first:], *arms[:first]]


def said(row: Row) -> str:
    """A row in a line: what a log shows while the run goes on."""
    median = "no time, emulated" if row.median is None else f"{row.median:.2f} ms"
    first = f", first token {row.ttft_ms.p50:.1f} (p99 {row.ttft_ms.p99:.1f})" if row.ttft_ms else ""
    hits = f", {row.hit_rate:.0%} of prompt tokens cached" if row.workload == "agent" and row.hit_rate else ""
    return f"{row.workload}, {row.case}, {row.arm}: {median}{first}{hits}"
