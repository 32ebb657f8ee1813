"""What a quantization run ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mixquant.integrations.transformers.sensitivity import GroupError


@dataclass(frozen=True)
class Result:
    """A written folder.

    format: of its layers. errors: mean relative squared error of the linear layers after each step, of their outputs
    where `calibrated`, otherwise of their weights. notes: sentences about what was left out. prefill_bytes: of the
    quantized layers; decode_bytes: of the BF16 model. sensitivity: what quantizing each group of layers alone does, in
    the arms that quantize the prompt only and the answer only; measured where the worst layers were to be ignored.
    """

    folder: Path
    format: str
    errors: dict[str, float]
    calibrated: bool
    notes: list[str]
    prefill_bytes: int
    decode_bytes: int
    sensitivity: dict[str, list[GroupError]] = field(default_factory=dict)

    @property
    def measured(self) -> str:
        """What the errors are of."""
        return "outputs" if self.calibrated else "weights"
