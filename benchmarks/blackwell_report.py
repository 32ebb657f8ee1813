"""The report of blackwell.py: what was found, and what to send to whom."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from mixquant.devices import size_text

ROUNDING = {
    None: "This device has no rounding to E2M1 of its own.",
    True: "This device rounds to E2M1 as the format does.",
    False: "This device does **not** round to E2M1 as the format does.",
}

SEND = """Please open an issue titled `ran on {device}` at the address that you cloned mixquant from (`git \
remote -v` prints it), or write to whoever gave it to you, and attach `{out}/blackwell.json` and \
`{out}/log.txt`. Wrong results and errors are as welcome as times. Both files name the model and packages, and \
the log may name folders of this machine: read them first. Prompts were random tokens."""


def markdown(document: dict[str, Any], out: Path) -> str:
    doctor, arms = document["doctor"], document["arms"]
    made = f"mixquant {document['mixquant']} ({document['commit'] or 'no checkout'})"
    versions = ", ".join(f"{name} {version}" for name, version in doctor["versions"].items() if version)
    asked = f"{doctor['model']}, prefill={document['prefill']}, {document['minutes']} minutes"
    parts = [
        f"# mixquant on {doctor['device']}",
        f"{made}, {asked}. {versions}",
        "## Right or not",
        right(document["correctness"]),
        rounding(document["rounding"]),
        "## How fast, in how much memory",
        times(arms),
        "Medians and ranges of five rounds. Arms ran one after another: `bf16 again` against `bf16` is the drift.",
        memory(arms),
        "## Send",
        SEND.format(device=doctor["device"], out=out.name),
    ]
    return "\n\n".join(parts) + "\n"


def rounding(found: bool | str | None) -> str:
    if isinstance(found, str):
        return f"Whether this device rounds to E2M1 as the format does could **not** be tried: {found}"
    return ROUNDING[found]


def right(checked: list[dict[str, Any]]) -> str:
    """A row for each product, and below a line for each kernel that is not for this device."""
    rows = ["| kernel | layer | N x K | rows | off by | unquantized | right |", "|---" * 7 + "|"]
    rejected = [f"- {row['kernel']} was rejected: {row['rejected']}" for row in checked if "rejected" in row]
    for row in checked:
        if "rejected" in row:
            continue
        cells = [row["kernel"], row["layer"], f"{row['n']} x {row['k']}", str(row.get("rows", "any"))]
        if "error" in row:
            cells += [row["error"], "", "**no**"]
        else:
            cells += [f"{row['distance']:.1e}", f"{row['control']:.1e}", "yes" if row["right"] else "**no**"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", *rejected] if rejected else rows)


def times(arms: dict[str, Any]) -> str:
    """One row for each workload, one column for each arm; with the ratio to BF16."""
    workloads = list(dict.fromkeys(name for arm in arms.values() for name in arm.get("ms") or ()))
    if not workloads:
        return "No arm has times."
    rows = [f"| ms | {' | '.join(arms)} |", "|---" * (len(arms) + 1) + "|"]
    for workload in workloads:
        base = (arms["bf16"].get("ms") or {}).get(workload)
        rows.append(f"| {workload} | {' | '.join(cell(arm, workload, base) for arm in arms.values())} |")
    return "\n".join(rows)


def cell(arm: dict[str, Any], workload: str, base: list[float] | None) -> str:
    found = (arm.get("ms") or {}).get(workload)
    if not found:
        return "–"
    ratio = f", {median(base) / median(found):.2f}x" if base else ""
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f}){ratio}"


def memory(arms: dict[str, Any]) -> str:
    """A line for each arm: its weights and kernels, or why it did not run."""
    lines = []
    for name, arm in arms.items():
        if "error" in arm:
            lines.append(f"- **{name}** did not run: {arm['error']}")
            continue
        kernels = ", ".join(f"{phase} {' + '.join(names)}" for phase, names in arm["kernels"].items())
        weights = f"weights {size_text(arm['weights_bytes'])}; " if arm["weights_bytes"] else ""
        lines.append(f"- **{name}**: {weights}{kernels}{'; emulated, so without times' if arm['emulated'] else ''}")
    return "\n".join(lines)
