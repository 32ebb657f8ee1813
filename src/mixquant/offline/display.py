"""What `mixquant quantize` shows on a terminal: a progress bar, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixquant.devices import size_text
from mixquant.formats.error import sqnr
from mixquant.offline import card
from mixquant.offline.card import Result
from mixquant.offline.source import Unit

WORST = 5


def shown(steps: Sequence[Any], stage: Callable[[str], None]) -> Iterator[Any]:
    """The steps behind a progress bar with an estimate, on a terminal; elsewhere `stage` is told which one it is."""
    console = Console(stderr=True)
    what = "quantizing" if isinstance(steps[0], Unit) else "measuring layers one by one"
    if console.is_terminal:
        yield from track(steps, what, console=console)
        return
    for number, step in enumerate(steps, start=1):
        stage(f"{what}, {number} of {len(steps)}")
        yield step


def show(result: Result) -> None:
    """Print what each step gained, and which layers are the most sensitive."""
    console = Console()
    table = Table("step", f"relative error of {result.measured}", "SQNR")
    for step, error in result.errors.items():
        table.add_row(card.step_name(step, result.format), f"{error:.3e}", f"{sqnr(error):.2f} dB")
    console.print(table)
    if result.sensitivity:
        console.print(_worst(result))
    for note in result.notes:
        console.print(note, soft_wrap=True)
    sizes = f"{size_text(result.prefill_bytes)} beside {size_text(result.decode_bytes)} of BF16"
    console.print(f"{result.folder}: {sizes}", soft_wrap=True)


def _worst(result: Result) -> Table:
    """The groups that move answers most if nothing else is quantized in the prompt, and what they do in the answer."""
    decode = {group.name: group for group in result.sensitivity["decode-only"]}
    table = Table("most sensitive alone", "KLD, prompt", "KLD, answer", "SQNR, prompt")
    for group in sorted(result.sensitivity["phase"], key=lambda group: -group.kld.mean)[:WORST]:
        noise = "none" if group.sqnr_db is None else f"{group.sqnr_db:.1f} dB"
        table.add_row(group.name, f"{group.kld.mean:.1e}", f"{decode[group.name].kld.mean:.1e}", noise)
    return table
