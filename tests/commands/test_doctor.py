"""What `mixquant doctor` says of vLLM's kernels: the reasons of a GPU's, and nothing that would slow or break it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from mixquant.commands import doctor
from mixquant.integrations.vllm.kernels import CutlassFP8, VllmNVFP4

CUDA = torch.device("cuda", 0)
MODULES = """
import json, sys, torch
from mixquant.commands.doctor import examine
found = examine(torch.device("cpu"))["vllm"]
print(json.dumps([found and sorted(found), "vllm" in sys.modules]))
"""


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))


@pytest.mark.usefixtures("blackwell")
def test_a_vllm_without_fp4_is_named_with_the_cuda_that_it_needs() -> None:
    pytest.importorskip("vllm")
    found = doctor._vllm(CUDA)
    assert found is not None
    first = found["nvfp4"]["candidates"][0]
    assert (first["kernel"], first["accepted"]) == ("vllm.nvfp4", False)
    assert first["reason"].endswith("install a vLLM that is built for CUDA 12.9 or newer")
    assert first["reason"] in found["nvfp4"]["reason"]
    assert found["fp8"]["candidates"][0]["kernel"] == "vllm.cutlass_fp8"
    assert set(found) == {"nvfp4", "fp8"}


@pytest.mark.usefixtures("blackwell")
def test_a_vllm_that_does_not_import_is_a_reason_and_breaks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device, dtype: torch.dtype) -> None:
        raise ImportError("libcudart.so.12: no such file\nand more")

    monkeypatch.setattr(doctor, "installed", lambda name: True)
    for kernel in (VllmNVFP4, CutlassFP8):
        monkeypatch.setattr(kernel, "check", fails)
    found = doctor._vllm(CUDA)
    assert found is not None
    reasons = [found[format]["candidates"][0]["reason"] for format in ("nvfp4", "fp8")]
    assert (
        reasons
        == ["cannot be asked (ImportError: libcudart.so.12: no such file): install again what it is part of"] * 2
    )
    assert found["nvfp4"]["candidates"][-1]["accepted"]  # emulation's answer is its own


def test_without_vllm_there_is_nothing_to_say_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda name: False)
    assert doctor._vllm(CUDA) is None


def test_on_a_cpu_the_answers_need_no_import_of_vllm() -> None:
    pytest.importorskip("vllm")
    ran = subprocess.run([sys.executable, "-c", MODULES], env=os.environ, check=True, capture_output=True, text=True)
    assert json.loads(ran.stdout) == [["fp8", "nvfp4"], False]


def test_the_table_names_the_plugin_s_kernels_beside_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    report = doctor.examine(torch.device("cpu"))
    doctor.show(report | {"vllm": {"nvfp4": report["formats"]["nvfp4"]}})
    assert "nvfp4 in vLLM" in capsys.readouterr().out
    doctor.show(report | {"vllm": None})
    assert "in vLLM" not in capsys.readouterr().out
