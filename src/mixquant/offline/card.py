"""What a run ends with, and the model card that says it: what was done, what it gained and costs, how to repeat it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mixquant.checkpoint.sidecar import Sidecar
from mixquant.devices import size_text
from mixquant.formats import FORMATS
from mixquant.formats.error import sqnr
from mixquant.integrations.transformers.sensitivity import GroupError
from mixquant.offline.calibration_text import AGENTS

STEPS = {
    "amax": "largest magnitudes",
    "fold": "channels folded by powers of two",
    "search": "block scales searched",
    "gptq": "GPTQ",
}
"""The steps of the recipe in words."""


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


def step_name(step: str, format: str) -> str:
    """A step in words; only block scales have global ones above them."""
    return STEPS[step] + (", shared globals" if step == "amax" and FORMATS[format].block else "")


def text(result: Result, sidecar: Sidecar, base_model: str) -> str:
    """README.md, the same for the same run."""
    return f"""---
base_model: {base_model}
base_model_relation: quantized
library_name: mixquant
tags: [mixquant, compressed-tensors]
---

{_what(result, sidecar, base_model)}
{_gains(result)}
{_bill(result)}
{_run(result, sidecar)}
{_repeat(result, sidecar, base_model)}"""


def _what(result: Result, sidecar: Sidecar, base_model: str) -> str:
    format = sidecar.policy.prefill.upper()
    assert sidecar.decode_model is not None
    folded = (
        "Its channels were folded, which changes what stands in the KV cache: `decode/` holds the BF16 model that "
        "belongs to it, and gives the original's answers."
        if sidecar.recipe["fold"]
        else f"The BF16 model beside it is `{sidecar.decode_model.model}`."
    )
    notes = "\n".join(["", *(f"- {note}" for note in result.notes), ""]) if result.notes else ""
    return f"""# {result.folder.name}

The linear layers of `{base_model}` in {format}, for reading prompts; answers are written by a BF16 model.
The folder is plain compressed-tensors: without mixquant, engines serve it as a uniformly {format} model.
{folded}
{notes}"""


def _gains(result: Result) -> str:
    calibrated = "outputs, on the last tokens of the calibration text, which the recipe did not see"
    rows = "\n".join(
        f"| {step_name(step, result.format)} | {error:.3e} | {sqnr(error):.2f} dB |"
        for step, error in result.errors.items()
    )
    return f"""## Recipe

Mean relative squared error of the linear layers' {calibrated if result.calibrated else "weights"}, after each step:

| step | error | SQNR |
|---|---|---|
{rows}

`errors.json` has them by layer, `mixquant.json` has all settings.
"""


def _bill(result: Result) -> str:
    decode, prefill = result.decode_bytes, result.prefill_bytes
    parts = f"{size_text(decode)} for the BF16 model + {size_text(prefill)} for the quantized layers"
    total = f"{size_text(decode + prefill)}, {1 + prefill / decode:.2f} times the BF16 model"
    return f"## Memory\n\n{parts} = {total} (more where the format is emulated).\n"


def _run(result: Result, sidecar: Sidecar) -> str:
    name, named = result.folder.name, sidecar.decode_model
    assert named is not None
    demo = "from mixquant.checkpoint.locate import DEMO\n" if named.model == "demo" else ""
    decode = "DEMO" if demo else f'"{name}/decode"' if named.model == "decode" else f'"{named.model}"'
    revision = f', revision="{named.revision}"' if named.revision else ""
    return f"""## Run

```bash
vllm serve {name} --quantization mixquant    # phase-aware: prompts quantized, answers BF16
vllm serve {name}                            # stock vLLM: uniformly quantized
mixquant generate {name} --prompt-file PROMPT
```

```python
import mixquant
{demo}from transformers import AutoModelForCausalLM

config = mixquant.MixQuantConfig(prefill_weights="{name}")
model = AutoModelForCausalLM.from_pretrained(
    {decode}{revision}, quantization_config=config, dtype="bfloat16"
)
```
"""


def _repeat(result: Result, sidecar: Sidecar, base_model: str) -> str:
    recipe, policy = sidecar.recipe, sidecar.policy
    calibration = recipe["calibration"]
    source = "none" if calibration is None else calibration["source"]
    blocks = FORMATS[policy.prefill].block is not None  # others have no scale rule, no GPTQ and no calibrated inputs
    options = [
        f"--prefill {policy.prefill}",
        f"--scales {policy.scales}" if blocks else "",
        "--fold" if recipe["fold"] else "",
        "" if not blocks else "--gptq" if recipe["gptq"] else "--no-gptq",
        f"--calibration {source}" if source != AGENTS and (calibration or blocks) else "",
        *(f"--ignore '{pattern}'" for pattern in recipe["ignore"]),
        "" if recipe["ignore_worst"] is None else f"--ignore-worst {recipe['ignore_worst']}",
        f"--device {recipe['device']}",
    ]
    command = " ".join(["mixquant quantize", base_model, "-o", result.folder.name, *filter(None, options)])
    read = (
        f", calibrated on {calibration['tokens']:,} tokens (SHA-256 of their ids {calibration['sha256']})"
        if calibration
        else ""
    )
    return f"""## Repeat

```bash
{command}
```

Made with mixquant {recipe["mixquant"]} and torch {recipe["torch"]} on {recipe["device"]}{read}.
"""
