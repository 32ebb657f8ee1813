"""What `benchmarks/blackwell.sh` finds and says, as far as no GPU is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import blackwell, blackwell_estimate
from benchmarks.blackwell_report import markdown, right, times

from mixquant.checkpoint.locate import DEMO, find
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.kernels.emulation import EmulatedNVFP4
from mixquant.policy import Policy

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def arm(first: float, kernel: str = "vllm.x", emulated: bool = False) -> dict[str, object]:
    ms = None if emulated else {"first token, 512 tokens": [first, first + 1, first + 2]}
    kernels = {"prefill": [kernel], "decode": ["vllm.bf16"]}
    return {"kernels": kernels, "emulated": emulated, "weights_bytes": 1 << 30, "ms": ms}


DOCUMENT = {
    "mixquant": "0", "commit": None, "prefill": "nvfp4", "minutes": 3.5, "rounding": True,
    "doctor": {"device": "GPU", "model": "m", "versions": {"torch": "2", "vllm": None}},
    "correctness": [{"kernel": "k", "layer": "l", "n": 16, "k": 32, "rows": 1, "distance": 1e-3, "control": 0.1,
                     "right": True}],
    "arms": {"bf16": arm(20), "phase nvfp4": arm(10), "vLLM nvfp4": {"error": "no W4A4 kernel"}},
}  # fmt: skip


def test_the_report_has_times_ratios_kernels_and_what_did_not_run() -> None:
    text = markdown(DOCUMENT, Path("folder/out"))
    assert "| first token, 512 tokens | 21.00 (20.00 to 22.00), 1.00x | 11.00 (10.00 to 12.00), 1.91x | – |" in text
    assert "**vLLM nvfp4** did not run: no W4A4 kernel" in text
    assert "**phase nvfp4**: weights 1.00 GiB; prefill vllm.x, decode vllm.bf16" in text
    assert "`out/blackwell.json`" in text
    assert "folder/out" not in text
    assert "`git remote -v`" in text


def test_the_report_says_why_kernels_were_rejected_and_what_could_not_be_tried() -> None:
    needed = "install a vLLM that is built for CUDA 12.9 or newer"
    checked = [*DOCUMENT["correctness"], {"kernel": "vllm.nvfp4", "rejected": needed}]  # type: ignore[misc]
    text = markdown(DOCUMENT | {"correctness": checked, "rounding": "PTXASError: no such target"}, Path("out"))
    assert f"\n\n- vllm.nvfp4 was rejected: {needed}\n" in text
    assert "| k | l | 16 x 32 | 1 | 1.0e-03 | 1.0e-01 | yes |" in text
    assert "could **not** be tried: PTXASError: no such target" in text
    assert "rejected" not in markdown(DOCUMENT, Path("out"))


def test_a_run_that_is_stopped_leaves_the_report_of_the_arms_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ran = blackwell.Run("demo", tmp_path / "out", "fp8", 20), iter([arm(20), arm(10)])
    monkeypatch.setattr(blackwell, "examine", lambda *_: DOCUMENT["doctor"])
    monkeypatch.setattr(blackwell, "correctness", lambda *_: DOCUMENT["correctness"])
    monkeypatch.setattr(run, "_arm", lambda command: next(ran))
    with pytest.raises(StopIteration):  # the third arm
        run.all()
    assert "| ms | bf16 | phase fp8 |" in (tmp_path / "out/report.md").read_text()
    assert list(json.loads((tmp_path / "out/blackwell.json").read_text())["arms"]) == ["bf16", "phase fp8"]


def test_an_emulated_arm_has_no_times_and_a_wrong_kernel_is_seen() -> None:
    assert times({"bf16": arm(1, emulated=True)}) == "No arm has times."
    checked = [
        DOCUMENT["correctness"][0] | {"right": False},
        {"kernel": "k", "layer": "l", "n": 1, "k": 1, "error": "e"},
    ]  # type: ignore[index]
    assert right(checked).count("**no**") == 2


def test_a_kernel_is_right_and_a_control_is_wrong() -> None:
    found = blackwell.compared(EmulatedNVFP4, "nvfp4", 9, 48, 96, CPU)
    assert found["right"]
    assert found["distance"] < 3e-3 < blackwell.FAR * found["control"]

    class Wrong(EmulatedNVFP4):
        def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return super().__call__(x, bias) * 1.01

    class OneColumn(EmulatedNVFP4):
        def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return super().__call__(x, bias).roll(1, 1)

    class Broken(EmulatedNVFP4):
        def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            raise RuntimeError("no image for this device\nand more")

    assert not blackwell.compared(OneColumn, "nvfp4", 9, 48, 96, CPU)["right"]
    assert not blackwell.compared(Wrong, "nvfp4", 9, 48, 96, CPU)["right"]
    assert blackwell.compared(Broken, "nvfp4", 9, 48, 96, CPU)["error"] == "RuntimeError: no image for this device"


def test_what_fails_on_the_way_is_kept_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here there is no Triton, so that trying the rounding fails as it would on a GPU without."""

    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mixquant.kernels.nvfp4_quantizer", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    run = blackwell.Run("demo", tmp_path / "out", "nvfp4", 20)
    monkeypatch.setattr(blackwell, "examine", lambda *_: DOCUMENT["doctor"])
    monkeypatch.setattr(blackwell, "products", broken)
    monkeypatch.setattr(run, "_arm", lambda command: arm(20))
    monkeypatch.setattr(blackwell, "rounding", lambda _, rounding=blackwell.rounding: rounding(torch.device("cuda", 0)))
    run.all()
    found = json.loads((tmp_path / "out/blackwell.json").read_text())
    assert found["rounding"].startswith("ModuleNotFoundError: ")
    tried = [row["error"] for row in found["correctness"] if "rejected" not in row]
    assert tried == ["RuntimeError: "] * len(tried) != []
    assert list(found["arms"]) == ["bf16", "phase nvfp4", "vLLM fp8", "vLLM nvfp4", "bf16 again"]
    assert "could **not** be tried: ModuleNotFoundError: " in (tmp_path / "out/report.md").read_text()


def test_every_shape_of_the_model_is_checked_once() -> None:
    rejected, *rows = blackwell.correctness(find("demo"), "fp8", CPU)
    assert rejected == {"kernel": "torch.scaled_mm.fp8", "rejected": "runs on CUDA, not on cpu"}
    assert {(row["n"], row["k"]) for row in rows} == {(384, 384), (192, 384), (640, 384), (384, 640)}
    assert len(rows) == 4 * len(blackwell.ROWS)
    assert all(row["right"] for row in rows)
    assert blackwell.rounding(CPU) is None


def test_the_cause_of_a_failed_arm_is_the_last_error_that_points_to_no_other() -> None:
    log = "(Worker pid=1) ERROR ValueError: no kernel\nRuntimeError: failed. See root cause above.\nbye\n"
    assert blackwell.last_error(log) == "ValueError: no kernel"
    assert blackwell.last_error("x\nmixquant: Name a folder.\n") == "mixquant: Name a folder."
    assert blackwell.last_error("ValueError: no kernel. Reasons: \r\n") == "ValueError: no kernel. Reasons:"
    assert blackwell.last_error("killed") == "ended without a word: see log.txt"


def test_a_process_that_fails_or_takes_too_long_is_said_and_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("OldError: of the process before, ü\n")
    assert blackwell.process(["zipfile", "-l", str(tmp_path / "none")], log, 60) == (
        f"FileNotFoundError: [Errno 2] No such file or directory: '{tmp_path / 'none'}'"
    )
    assert blackwell.process(["platform"], log, 60) is None
    assert blackwell.process(["http.server", "--bind", "127.0.0.1", "0"], log, 1) == "stopped: the time was over"
    assert blackwell.process(["platform"], log, 0) == "left out: the time was over"


def test_the_estimate_is_what_its_command_prints_and_above_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["blackwell_estimate.py"])
    blackwell_estimate.main()
    assert capsys.readouterr().out == (ROOT / "benchmarks/results/blackwell-estimate.md").read_text()
    for (gpu, model), points in blackwell_estimate.MEASURED.items():
        for tokens, found in points.items():
            estimate = blackwell_estimate.gain(
                blackwell_estimate.GPUS[gpu], blackwell_estimate.SHAPES[model], tokens, 0
            )
            assert 0.6 * estimate < found < estimate


def test_the_estimate_has_the_default_tail_since_a_longer_one_makes_short_prompts_of_experts_slower() -> None:
    gpu, experts = blackwell_estimate.GPUS["B200"], blackwell_estimate.SHAPES["Qwen3-30B-A3B"]
    assert Policy().tail == blackwell_estimate.TAIL
    tail = experts.experts * (1 - (120 / 128) ** Policy().tail) + experts.dense
    assert experts.touched(Policy().tail) == pytest.approx(tail)
    assert blackwell_estimate.touched_experts() == "87 %"
    assert blackwell_estimate.gain(gpu, experts, 512, 32) < 1 < blackwell_estimate.gain(gpu, experts, 512)
    assert blackwell_estimate.gain(gpu, experts, 512) == blackwell_estimate.gain(gpu, experts, 512, 1)
    dense = blackwell_estimate.SHAPES["Qwen3-8B"]  # one read of the weights, whatever the tail
    assert blackwell_estimate.gain(gpu, dense, 512) == blackwell_estimate.gain(gpu, dense, 512, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "out", "said"),
    [("./nowhere", "out", "./nowhere is not a folder"), ("demo", "file/out", "cannot be written")],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, model: str, out: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src")}
    command = [ROOT / "benchmarks/blackwell.sh", model, tmp_path / out]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("blackwell: ")
    assert {file.name for file in tmp_path.iterdir()} == {"file"}


@pytest.mark.slow
def test_an_arm_names_its_kernels_and_shows_no_time_where_they_are_emulated(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.blackwell_arm", DEMO, tmp_path / "arm.json", "--prefill", "nvfp4"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "VLLM_PLUGINS": "",  # a checkout that is not installed has none
    }
    subprocess.run(command, env=environment, check=True, capture_output=True)
    found = json.loads((tmp_path / "arm.json").read_text())
    assert found["kernels"] == {"prefill": ["emulation.nvfp4"], "decode": ["vllm.bf16"]}
    assert found["emulated"]
    assert found["ms"] is None


EMULATES = """
def register():
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum
    linear.register_linear_kernel(linear.EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
"""


@pytest.mark.slow
def test_the_arm_of_stock_nvfp4_loads_the_folder_that_the_quantizer_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM has no NVFP4 kernel for CPUs, and says so; by a plugin that lends it its own emulation the folder runs."""
    plugin, folder = tmp_path / "plugin", tmp_path / "out/nvfp4"
    (plugin / "emulates-0.dist-info").mkdir(parents=True)
    (plugin / "emulates.py").write_text(EMULATES)
    (plugin / "emulates-0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: emulates\nVersion: 0\n")
    entry = "[vllm.general_plugins]\nemulates = emulates:register\n"
    (plugin / "emulates-0.dist-info/entry_points.txt").write_text(entry)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "src", ROOT, plugin))))
    monkeypatch.setenv("VLLM_PLUGINS", "")
    run = blackwell.Run("demo", tmp_path / "out", "nvfp4", 20)
    refused = run._arm([str(folder)])
    assert refused == {
        "error": "ValueError: Failed to find a kernel that can implement the NVFP4 linear layer. Reasons:"
    }
    assert QuantizedFolder(folder).formats == {"nvfp4"}
    monkeypatch.setenv("VLLM_PLUGINS", "emulates")
    kernel = ["vllm.CompressedTensorsW4A4Fp4.EmulationNvFp4LinearKernel"]
    found = run._arm([str(folder)])
    assert (found["kernels"], found["ms"]) == ({"prefill": kernel, "decode": kernel}, None)
    assert found["emulated"]
