"""What is overheard while engines start, and the cause of a failure in it."""

from __future__ import annotations

import subprocess
import sys

from mixquant.integrations.vllm.overheard import causes

OVERHEARD = """
import os, subprocess, sys, time
from mixquant.integrations.vllm.overheard import overheard
with overheard() as said:
    print("ours", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-c", "import sys; print('a child', file=sys.stderr)"])
    while len(said) < 2: time.sleep(0.01)
print("later", file=sys.stderr, flush=True)
print(said)
"""


def test_lines_of_this_process_and_its_children_are_heard_and_still_seen() -> None:
    done = subprocess.run([sys.executable, "-c", OVERHEARD], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "['ours', 'a child']"
    assert done.stderr.splitlines() == ["ours", "a child", "later"]


def test_the_cause_is_the_first_error_of_a_process() -> None:
    lines = [
        "(Worker pid=12) INFO 11-29 15:46:26 [worker.py:1] RuntimeError: not this",
        "(Worker pid=12) ERROR 11-29 15:46:26 [multiproc_executor.py:953] Traceback (most recent call last):",
        "(Worker pid=12) ERROR 11-29 15:46:26 [multiproc_executor.py:953] RuntimeError: no kernel: 3",
        "(EngineCore pid=11) ERROR 11-29 15:46:27 [core.py:1] torch.OutOfMemoryError: CUDA out of memory.",
        "(EngineCore pid=11) ERROR 11-29 15:46:27 [core.py:1] RuntimeError: failed. See root cause above.",
        "(EngineCore pid=11) ERROR 11-29 15:46:27 [core.py:1] ValueError: a second one",
    ]
    assert causes(lines) == ["RuntimeError: no kernel: 3", "OutOfMemoryError: CUDA out of memory."]
    assert causes(["all is well"]) == []
