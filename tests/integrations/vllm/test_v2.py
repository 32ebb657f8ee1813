"""vLLM's V2 model runner, the default for dense models on GPUs, against V1."""

from __future__ import annotations

import pytest

from tests.integrations.vllm import recording, v2
from tests.integrations.vllm.scenarios import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not v2.TRITON.exists(), reason=f"no Triton in {v2.TRITON}: `make test` puts it there"),
]


@pytest.fixture(scope="module")
def v2_runs(folder, tmp_path_factory) -> dict[str, Run]:
    return v2.run_apart(folder, tmp_path_factory.mktemp("v2") / "runs")


@pytest.mark.parametrize("name", v2.SCENARIOS)
def test_v2_runner(run, check, v2_runs, name):
    """The V2 runner: V1, one request at a time"""
    scenario, ours = v2.SCENARIOS[name], v2_runs[name]
    assert ours.runners == [recording.V2]
    check(ours, run(scenario.simplest), *map(run, scenario.controls))
