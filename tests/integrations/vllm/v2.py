"""Runs on vLLM's V2 model runner, made in a process of their own: python -m tests.integrations.vllm.v2 MODEL OUT

V2 launches Triton kernels. On a CPU they run in Triton's interpreter, for which three things are switched before vLLM
is imported, all of them for a whole process: the interpreter, the runner, and vLLM's belief that this Triton has a CPU
backend. Triton is no part of the other tests' environment; `make test` installs it beside, in .venv/triton.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from tests.integrations.vllm import scenarios
from tests.integrations.vllm.scenarios import Run

TRITON = Path(sys.prefix) / "triton"
"""Where `make test` puts Triton."""

SCENARIOS = {
    "concurrent": scenarios.TOGETHER,
    "preempted": scenarios.CROWDED,
    "one-row chunks": scenarios.TRICKLING,
    "n-gram drafts": scenarios.NGRAM,
    "tail of four": scenarios.TAILS[4],
    "short prompts": replace(scenarios.CROWDED, policy=scenarios.PHASE | {"min_prompt": 24}),
}


def run_apart(model: Path, out: Path) -> dict[str, Run]:
    """The runs of SCENARIOS on V2, by a process that leaves them in the file `out`."""
    environment = {
        "PYTHONPATH": os.pathsep.join([str(TRITON), *sys.path]), "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.integrations.vllm.v2", str(model), str(out)]
    subprocess.run(command, check=True, env=os.environ | environment)
    return dict(pickle.loads(out.read_bytes()))


def believe_in_triton() -> None:
    """Let vLLM find a CPU backend in Triton; torch.compile, which needs real ones, must not."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=None)
    import vllm.triton_utils

    assert vllm.triton_utils.HAS_TRITON
    del backends["cpu"]


def main(model: Path, out: Path) -> None:
    believe_in_triton()
    runs = {name: scenarios.run(model, scenario) for name, scenario in SCENARIOS.items()}
    out.write_bytes(pickle.dumps(runs))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
