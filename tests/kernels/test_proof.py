"""The table of what has been proven: complete, backed by files, and the only place that says so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mixquant.kernels import KERNELS, NESTED, proof
from mixquant.kernels.proof import BLACKWELL, HARDWARE, NEVER, PROOFS, hardware, proven

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_every_kernel_has_a_row() -> None:
    names = {kernel.name for kernel in (*(k for kernels in KERNELS.values() for k in kernels), *NESTED)}
    assert names <= set(PROOFS)
    assert all(set(by) <= set(HARDWARE) for by in PROOFS.values())


@pytest.mark.parametrize("kernel", PROOFS)
def test_every_proof_names_a_file_that_is_there(kernel: str) -> None:
    for found in PROOFS[kernel].values():
        assert (found.by is None) == (found.how == "never")
        assert found.by is None or (ROOT / found.by).is_file()


def test_nothing_runs_on_blackwell_by_a_file_that_needs_no_gpu() -> None:
    """Where a Blackwell entry says `ran`, the output of a run must be kept: a test that skips is no proof."""
    for kernel, by in PROOFS.items():
        for name in BLACKWELL:
            found = by.get(name, NEVER)
            assert found.how != "ran" or str(found.by).startswith("benchmarks/results/"), kernel


def test_the_page_holds_the_table_word_for_word() -> None:
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    assert proof.markdown() in page
    assert proof.markdown().replace("ran", "never", 1) not in page  # control
    assert proof.__doc__ is not None
    for line in re.findall(r"^    (\w+) +(.*)$", proof.__doc__, re.MULTILINE):
        assert f"| {line[0]} | {line[1]} |" in page


def test_the_readme_says_that_nothing_ran_on_blackwell_as_long_as_that_is_so() -> None:
    ran = [kernel for kernel, by in PROOFS.items() for name in BLACKWELL if by.get(name, NEVER).how == "ran"]
    said = "On Blackwell nothing has run yet" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert said == (not ran)


@pytest.mark.parametrize(
    ("capability", "column"),
    [((8, 9), "Ada"), ((9, 0), "Hopper"), ((10, 3), "B300"), ((12, 1), "DGX Spark"), ((8, 0), None)],
)
def test_a_gpu_is_found_by_its_compute_capability(
    capability: tuple[int, int], column: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    cuda = torch.device("cuda", 0)
    assert hardware(cuda) == column
    assert proven("mixquant.nvfp4_quantizer", cuda).how == {
        "Ada": "never", "Hopper": "ran", "B300": "compiled", "DGX Spark": "compiled", None: "never",
    }[column]  # fmt: skip


def test_a_row_in_words_leaves_nothing_out() -> None:
    said = "ran: Hopper; compiled: B200, B300, RTX 50, DGX Spark; emulated: CPU"
    assert proof.sentence("mixquant.nvfp4_quantizer") == said
    for kernel, by in PROOFS.items():
        assert sum(len(part.split(", ")) for part in proof.sentence(kernel).split("; ")) == len(by)


def test_a_cpu_has_a_column_of_its_own() -> None:
    assert hardware(CPU) == "CPU"
    assert proven("onednn.int8", CPU).how == "ran"
