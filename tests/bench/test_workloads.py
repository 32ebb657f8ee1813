"""Workloads: their cases, what a window holds, and files that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixquant.bench.workloads import NAMED, Agent, Decode, Prompts, Workload, fitting, read, tokens
from mixquant.errors import InputError


def file(folder: Path, **fields: Any) -> str:
    path = folder / "workload.json"
    path.write_text(json.dumps(fields))
    return str(path)


def test_names_and_files_mix(tmp_path: Path) -> None:
    found = read(["decode", file(tmp_path, workload="prompts", alone=[8])])
    assert found == [NAMED["decode"], Prompts(alone=[8])]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"workload": "prompt"}, "prompts"),
        ({"workload": "prompts", "alone": ["8"]}, "alone"),
        ({"workload": "prompts", "alone": [0]}, "alone"),
        ({"workload": "prompts", "lengths": [8]}, "lengths"),
        ({"workload": "agent", "system": [9, 8]}, "the smaller one first"),
        ({"alone": [8]}, "workload"),
    ],
)
def test_a_file_that_is_no_workload(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read([file(tmp_path, **fields)])


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean prompts"):
        read(["promts"])
    with pytest.raises(InputError, match="No workload is named"):
        read([])


def test_cases_of_prompts() -> None:
    cases = list(Prompts(alone=[10], together=[20], requests=4, cached=[100], new=[5, 6]).cases())
    assert [(case.isl, case.cached, case.new, case.batch) for case in cases] == [
        (10, 0, 10, 1),
        (20, 0, 20, 4),
        (105, 100, 5, 1),
        (106, 100, 6, 1),
    ]
    assert [case.window for case in cases] == [11, 21, 106, 107]
    assert cases[1].tokens == 84


def test_a_window_leaves_out_what_it_cannot_hold() -> None:
    kept, notes = fitting([Prompts(alone=[10, 100], together=[], cached=[])], window=50)
    assert [case.isl for case in kept] == [10]
    assert notes == ["Left out prompts, 100 tokens: it takes 101 tokens of the model's 50."]
    everything, none = fitting([Prompts(alone=[10, 100], together=[], cached=[])], window=None)
    assert len(everything) == 2
    assert none == []


def test_nothing_that_fits_is_refused() -> None:
    with pytest.raises(InputError, match=r"window of 50 tokens \(the shortest takes 101\)"):
        fitting([Prompts(alone=[100], together=[], cached=[])], window=50)


def test_the_agents_conversations_are_those_of_the_issue() -> None:
    spec = Agent()
    assert len(spec.talks) == 16
    assert all(len(talk.tools) == len(talk.answers) == 8 for talk in spec.talks)
    assert all(8192 <= talk.system <= 16384 for talk in spec.talks)
    assert all(100 <= tool <= 4000 for talk in spec.talks for tool in talk.tools)
    assert all(60 <= answer <= 300 for talk in spec.talks for answer in talk.answers)
    assert spec.talks == Agent().talks != Agent(seed=1).talks


def test_conversations_of_one_agent_share_its_system_prompt() -> None:
    systems = {(talk.agent, talk.system) for talk in Agent().talks}
    assert len(systems) == 4
    (case,) = Agent().cases()
    own = sum(talk.length - talk.system for talk in Agent().talks)
    assert case.tokens == own + sum(system for _, system in systems)
    assert case.window == max(talk.length for talk in Agent().talks)


@pytest.mark.parametrize("spec", NAMED.values())
def test_names_of_cases_differ(spec: Workload) -> None:
    names = [case.name for case in spec.cases()]
    assert len(set(names)) == len(names)


def test_decode_holds_the_prompt_of_somebody_else() -> None:
    *_, beside = Decode(batches=[1], behind=10, steps=4, reading=100, neighbours=[3]).cases()
    assert (beside.batch, beside.new, beside.window) == (3, 100, 101)
    assert beside.tokens == 3 * 15 + 101


def test_tokens_are_seeded_and_none_is_special() -> None:
    assert tokens(50, 64, "a") == tokens(50, 64, "a") != tokens(50, 64, "b")
    assert min(tokens(500, 64, "a")) >= 3
    assert max(tokens(500, 64, "a")) < 64
