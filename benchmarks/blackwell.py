"""What NVFP4 does on your Blackwell GPU: right or not, how fast, in how much memory. See blackwell.sh.

    benchmarks/blackwell.sh MODEL OUT [--prefill fp8] [--minutes 20]

Three parts, and OUT/blackwell.json is written after each part and arm, so that a run that is stopped leaves what it
found.

    doctor        the device, versions, and each kernel's answer with its reason
    correctness   every kernel that this device accepts against the float64 reference, at the model's own shapes;
                  the control is how far the unquantized product is from it. The others with their reasons. And whether
                  the GPU's own rounding to E2M1 is the format's.
    arms          vLLM's BF16, mixquant (phase), vLLM's FP8, vLLM's NVFP4, and BF16 again: its difference to the first
                  is what the machine drifted. An arm is a process of its own, one at a time, for GPUs of 24 GiB too.

What raises, a kernel, the rounding or an arm, is kept with its reason, and the run goes on. `--prefill fp8` puts FP8 in
NVFP4's place, for GPUs without FP4.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.blackwell_report import markdown
from mixquant import __version__
from mixquant.checkpoint.locate import Found, find
from mixquant.commands.doctor import asked, examine
from mixquant.devices import parse_device
from mixquant.errors import InputError
from mixquant.files import read_object, write_json, write_text, writing
from mixquant.formats import FORMATS, quantizer
from mixquant.formats.nvfp4 import ACTIVATION_GLOBAL_SCALE
from mixquant.integrations.transformers.loading import meta_model
from mixquant.kernels import KERNELS, Rejected, Table
from mixquant.kernels.base import QuantizedKernel
from mixquant.model.targets import target_linears
from mixquant.packages import commit, installed
from mixquant.policy import Policy

ROWS = (1, 300)
MOST_SHAPES = 6
FAR, LARGER = 0.2, 5e-3
"""A kernel is right that stays within a fifth of what the format itself costs, and whose results are as large as the
reference's to half a percent. One rounding to BF16 is 1.7e-3 in the norm at most. Kernels may be further off and right:
vLLM's for FP8 lets Hopper add products in fewer bits than float32, which shows the more the longer K is (3.5e-3 at
12,288), and quantizers that divide by an approximation break ties otherwise, which moves a code in a few hundred. A
wrong layout is off by about 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prefill", choices=("nvfp4", "fp8"), default="nvfp4")
    parser.add_argument("--minutes", type=float, default=20, help="for everything; what does not fit is left out")
    args = parser.parse_args()
    try:
        Run(args.model, args.out, args.prefill, args.minutes).all()
    except InputError as error:
        print(f"blackwell: {error}", file=sys.stderr)
        sys.exit(2)


class Run:
    """One run, and the document that grows with it."""

    def __init__(self, model: str, out: Path, prefill: str, minutes: float) -> None:
        if not installed("vllm"):
            raise InputError("The arms run in vLLM, which is not installed: pip install '.[vllm]' in a checkout.")
        self.out, self.prefill, self.minutes, self.began = out, prefill, minutes, time.monotonic()
        self.found, self.device = find(model), parse_device(None)
        self.folder = str(self.found.download())
        with writing(out, "name a folder that you may write to"):
            out.mkdir(parents=True, exist_ok=True)
            (out / "log.txt").write_text("")
        self.document: dict[str, Any] = {"mixquant": __version__, "commit": commit(), "prefill": prefill}

    def all(self) -> None:
        print("1 of 3: what runs here", flush=True)
        self._keep(doctor=examine(self.device, self.found.name, self.prefill))
        print("2 of 3: is it right", flush=True)
        self._keep(correctness=correctness(self.found, self.prefill, self.device))
        self._keep(rounding=rounding(self.device))
        print("3 of 3: how fast, in how much memory", flush=True)
        arms: dict[str, Any] = {}
        for name, command in self._arms():
            print(f"  {name}", flush=True)
            arms[name] = self._arm(command)
            self._keep(arms=arms)
        print(f"Read {self.out / 'report.md'}: it says what to send, and where.")

    def _keep(self, **parts: Any) -> None:
        """Write what there is; a report from the first arm on."""
        self.document |= parts | {"minutes": round((time.monotonic() - self.began) / 60, 1)}
        with writing(self.out, "make room, or name another folder"):
            write_json(self.out / "blackwell.json", self.document)
            if "arms" in self.document:
                write_text(self.out / "report.md", markdown(self.document, self.out))

    def _arms(self) -> Iterator[tuple[str, list[str]]]:
        """Name and arguments of each arm."""
        yield "bf16", [self.folder]
        yield f"phase {self.prefill}", [self.folder, "--prefill", self.prefill]
        yield "vLLM fp8", [self.folder, "--quantization", "fp8"]
        if self.prefill == "nvfp4":
            yield "vLLM nvfp4", [str(self.out / "nvfp4")]
        yield "bf16 again", [self.folder]

    def _arm(self, arguments: list[str]) -> dict[str, Any]:
        """What an arm measured, or why it did not."""
        if arguments[0] == str(self.out / "nvfp4"):
            options = ["--scales", "amax", "--calibration", "none", "--no-gptq", "--overwrite"]  # quick, and as fast
            command = ["mixquant", "quantize", self.folder, "-o", arguments[0], *options]
            if failed := self._process(command):
                return {"error": failed}
        file = self.out / "arm.json"
        file.unlink(missing_ok=True)
        if failed := self._process(["benchmarks.blackwell_arm", arguments[0], str(file), *arguments[1:]]):
            return {"error": failed}
        document = read_object(file, "start again")
        file.unlink()
        return document

    def _process(self, module: list[str]) -> str | None:
        left = self.minutes * 60 - (time.monotonic() - self.began)
        return process(module, self.out / "log.txt", left)


def process(module: list[str], log: Path, left: float) -> str | None:
    """Run a module with its arguments in a process of its own for `left` seconds at most; why it failed, if it did."""
    if left <= 0:
        return "left out: the time was over"
    with log.open("ab") as stream:
        before = stream.tell()
        command = [sys.executable, "-m", *module]
        running = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
        try:
            status = running.wait(timeout=left)
        except subprocess.TimeoutExpired:
            return "stopped: the time was over"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)  # an engine that outlives it would keep the GPU's memory
            running.wait()
    return last_error(log.read_bytes()[before:].decode(errors="replace")) if status else None


def last_error(log: str) -> str:
    """The last error that a log names, past vLLM's own that point to another."""
    found = re.findall(r"\b\w*(?:Error|Exception): .*|^mixquant: .*", log, re.MULTILINE)
    causes = (error.strip() for error in reversed(found) if "root cause" not in error)
    return next(causes, "ended without a word: see log.txt")


def correctness(found: Found, format: str, device: torch.device) -> list[dict[str, Any]]:
    """By kernel and shape: the relative error against the reference, and the control's; or why it is rejected."""
    rows = []
    shapes: dict[tuple[int, int], str] = {}
    for name, linear in target_linears(meta_model(found), Policy(prefill=format)):
        shapes.setdefault((linear.out_features, linear.in_features), name)
    for answer in (asked(kernel, device) for kernel in table()[format]):
        if isinstance(answer.verdict, Rejected):
            rows.append({"kernel": answer.kernel.name, "rejected": answer.verdict.reason})
            continue
        assert issubclass(answer.kernel, QuantizedKernel)
        for (n, k), name in list(shapes.items())[:MOST_SHAPES]:
            row = {"kernel": answer.kernel.name, "layer": name, "n": n, "k": k}
            if reason := answer.kernel.unsupported(n, k):
                rows.append(row | {"error": reason})
                continue
            rows += [row | compared(answer.kernel, format, m, n, k, device) for m in ROWS]
    if device.type == "cuda":
        with suppress(RuntimeError):  # a kernel that read where it may not has ended CUDA for this process
            torch.cuda.empty_cache()  # the arms need the memory
    return rows


def table() -> Table:
    """vLLM's kernels too."""
    if torch.cuda.is_available():
        from mixquant.integrations.vllm.kernels import VLLM_KERNELS

        return VLLM_KERNELS
    return KERNELS


def compared(
    kernel: type[QuantizedKernel[Any]], format: str, m: int, n: int, k: int, device: torch.device
) -> dict[str, Any]:
    try:
        y, reference, unquantized = products(kernel, format, m, n, k, device)
        distance, control = (float((found - reference).norm() / reference.norm()) for found in (y, unquantized))
        size = float((y * reference).sum() / reference.square().sum())
    except Exception as error:  # whatever a kernel raises is what this run is there to find
        return {"rows": m, "error": said(error)}
    right = distance < FAR * control and abs(size - 1) < LARGER
    return {"rows": m, "distance": distance, "size": size, "control": control, "right": right}


def products(
    kernel: type[QuantizedKernel[Any]], format: str, m: int, n: int, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a random weight and rows, in float64: the kernel's, the reference's and the unquantized one."""
    generator = torch.Generator(device).manual_seed(m)
    weight, x = (torch.randn(size, k, generator=generator, device=device).bfloat16() for size in (n, m))
    quantize = quantizer(format, "amax")
    reference = FORMATS[format].quantize_input(x, ACTIVATION_GLOBAL_SCALE).matmul(quantize(weight))
    y = kernel.from_weight(weight, quantize)(x, None)
    return y.double(), reference, x.double() @ weight.double().T


def said(error: Exception) -> str:
    """An error's kind and the first line of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def rounding(device: torch.device) -> bool | str | None:
    """Whether the GPU's own conversion to E2M1 gives the format's codes; None where it has none, or what failed."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (10, 0):
        return None
    try:
        from mixquant.kernels.nvfp4_quantizer import rounds_in_hardware

        return rounds_in_hardware(device)
    except Exception as error:  # Triton, its compiler, ptxas: what was measured before stays, and the arms follow
        return said(error)


if __name__ == "__main__":
    main()
