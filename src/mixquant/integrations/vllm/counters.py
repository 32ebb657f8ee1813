"""Prometheus counters of rows by phase, beside vLLM's own at /metrics.

Rows are counted in the worker, and /metrics is answered by another process, the API server. Between them stand small
files in prometheus_client's own multi-process format, one for each engine, in a directory that both know:

    one API server     the front process makes the directory, and registers a collector that adds up its files
    several of them    vLLM made a directory for the metrics of all (PROMETHEUS_MULTIPROC_DIR): ours go there too

The first tensor-parallel rank of the first pipeline stage counts for its engine. Data-parallel engines differ in the
label `engine`, as in vLLM's counters. Those on another machine than the API server are not in its /metrics.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from mixquant.phase import RowCounts

logger = init_logger(f"vllm.{__name__}")

COUNTERS = {
    "mixquant_prompt_rows": "Prompt tokens computed in the prefill format.",
    "mixquant_tail_rows": "Prompt tokens computed in the decode format: tails, and short prompts.",
    "mixquant_decode_rows": "Tokens after the prompt, computed in the decode format; drafts included.",
    "mixquant_mixed_steps": "Engine steps with rows in both formats.",
    "mixquant_steps": "Engine steps.",
}
"""Names, without the suffix `_total` of their samples, and helps; in the order of `amounts`."""


def amounts(rows: RowCounts) -> tuple[int, ...]:
    """What one step adds to each counter."""
    return rows.prefill, rows.tail, rows.decode - rows.tail, int(rows.mixed), 1


class RowCounters:
    """The counters of one engine: made in the front process, opened and written in its worker."""

    def __init__(self) -> None:
        self.directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR") or _own_directory().name
        self._file: MmapedDict | None = None
        self._totals: dict[str, int] = {}  # by the file's keys

    def open(self, config: VllmConfig) -> None:
        """Make this engine's file, if this is the worker that counts; calling it again changes nothing."""
        if self._file is not None or get_tensor_model_parallel_rank() > 0 or not get_pp_group().is_first_rank:
            return
        if not Path(self.directory).is_dir():
            logger.warning_once("mixquant: this engine's rows are not counted: its API server is on another machine.")
            return
        names = ["model_name", "engine"]
        labels = [str(config.model_config.served_model_name), str(config.parallel_config.data_parallel_index)]
        handle, path = tempfile.mkstemp(prefix="counter_mixquant_", suffix=".db", dir=self.directory)
        os.close(handle)
        self._file = MmapedDict(path)
        self._totals = {mmap_key(name, f"{name}_total", names, labels, text): 0 for name, text in COUNTERS.items()}
        for key in self._totals:
            self._file.write_value(key, 0.0, 0.0)

    def add(self, rows: RowCounts) -> None:
        """Count one step; takes a few microseconds."""
        if self._file is None:
            return
        for key, amount in zip(self._totals, amounts(rows), strict=True):
            self._totals[key] += amount
            self._file.write_value(key, float(self._totals[key]), 0.0)


@functools.cache
def _own_directory() -> tempfile.TemporaryDirectory[str]:
    """The directory of this process's engines, which /metrics reads; removed when the process ends."""
    directory = tempfile.TemporaryDirectory(prefix="mixquant-metrics-")
    MultiProcessCollector(REGISTRY, directory.name)
    return directory
