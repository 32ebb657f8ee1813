"""Times of an answer: other jobs' share of them is noticed and said."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from mixquant.integrations.transformers.generation import Generation
from mixquant.integrations.transformers.stopwatch import Moment, Stopwatch


def test_times_are_of_the_tokens_and_waiting_of_all_threads() -> None:
    watch = Stopwatch(None, print, on_cpu=True)  # type: ignore[arg-type]
    watch._moments = [Moment(0.0, 0.0, 0.0), Moment(1.0, 0.6, 0.1), Moment(1.5, 0.8, 0.5), Moment(2.0, 1.0, 1.0)]
    threads = torch.get_num_threads()
    assert watch.times() == {
        "prefill_ms": 1000.0,
        "decode_ms_per_token": 500.0,
        "waiting": round(0.5 / threads, 3),
        "prefill_cpu_ms": round(600.0 / threads, 2),
        "decode_cpu_ms_per_token": round(200.0 / threads, 3),
    }


def test_a_gpu_and_a_single_token_leave_times_out() -> None:
    watch = Stopwatch(None, print)  # type: ignore[arg-type]
    watch._moments = [Moment(0.0, 0.0, 0.0), Moment(1.0, 0.6, 0.1)]
    assert {name for name, value in watch.times().items() if value is not None} == {"prefill_ms"}


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="Linux counts waiting")
def test_another_job_on_the_same_core_is_noticed() -> None:
    """Two busy processes on one core: each stands ready for about half of the time."""
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    burner = subprocess.Popen(["taskset", "-c", str(min(cores)), sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(0, core)
        start = Moment.now()
        while time.process_time() < start.cpu + 0.5:
            pass
        end = Moment.now()
    finally:
        burner.kill()
        os.sched_setaffinity(0, cores)
    assert (end.waited - start.waited) / (end.wall - start.wall) > 0.25


def answer(waiting: float | None) -> Generation:
    kernels = {"prefill": ["onednn.int8"], "decode": ["onednn.bf16"]}
    return Generation(
        "", [1], 9, {}, "CPU", kernels, False,
        prefill_ms=40.0, decode_ms_per_token=75.0, waiting=waiting, prefill_cpu_ms=20.0, decode_cpu_ms_per_token=15.0,
    )  # fmt: skip


def test_what_is_said() -> None:
    assert "other jobs" not in answer(0.02).summary()
    assert "other jobs" not in answer(None).summary()
    assert "decode 75.0 ms a token (other jobs had the cores for 60% of it" in answer(0.6).summary()
    assert "decode 15.0 ms a token of CPU time a thread" in answer(0.6).summary()
