"""mixquant.quantize: a BF16 checkpoint in, a quantized folder that everybody can load out.

    mixquant.quantize("Qwen/Qwen3-8B", "nvfp4", output="Qwen3-8B-NVFP4")

The checkpoint is read, and the folder written, one decoder layer after another. Whatever the model's size, memory holds
one decoder layer in float32, and with calibration the hidden states of the calibration text; with GPTQ also the mean
of x x^T for each input of that one layer, and one more matrix as large as the largest of them. Without calibration no
model runs at all. Choosing the worst layers is the exception, and a step before the run: it loads the whole model.

This module is the trunk: a `Request` (what is asked for) goes through a run, decoder layer by decoder layer, each taken
from the `Source`, through the `Recipe`, into the `Partial` folder.

The folder is plain compressed-tensors, which stock vLLM serves as a uniformly quantized model; `mixquant.json` beside
it names the BF16 model that answers. Folding changes what stands in the KV cache, so a folded folder brings its own
BF16 model along, in `decode/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixquant.checkpoint.locate import Found, find
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.sidecar import DecodeModel, fingerprint
from mixquant.devices import parse_device
from mixquant.integrations.transformers import sensitivity
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.integrations.transformers.sensitivity import GroupError
from mixquant.offline import calibration_text, card
from mixquant.offline.calibrate import LayerStream
from mixquant.offline.card import Result
from mixquant.offline.folder import compressed, quantization_config
from mixquant.offline.ignore_worst import measure_layers
from mixquant.offline.partial import DECODE, ModelInMemory, Partial, check_output
from mixquant.offline.recipe import Recipe, Statistics, check_tensors, mean_errors, quantize_layers
from mixquant.offline.request import Request
from mixquant.offline.source import Unit
from mixquant.policy import Policy

SENSITIVITY = "sensitivity.json"
"""What `ignore_worst` chose layers by: the report's rows, arm by arm."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]
Sensitivity = dict[str, list[GroupError]]


def quantize(
    model: str | Path | ModelInMemory,
    policy: Policy | str | Mapping[str, Any] = "nvfp4",
    *,
    output: str | Path,
    calibration: str | Path | None = calibration_text.AGENTS,
    fold: bool = False,
    gptq: bool | None = None,
    ignore_worst: float | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress = lambda units: units,
) -> Result:
    """Write the quantized folder `output`; a run that was killed goes on where it stopped.

    model: a BF16 model's folder or hub id, `demo`, or a Transformers model in memory, which is then saved into
    `output/decode`. policy: a preset's name, a Policy, or a mapping of its fields; `scales` and `ignore` count too.
    calibration: `agents`, a text or JSONL file (see `mixquant.offline.calibration_text`), or None. fold, gptq: further
    steps of the recipe; GPTQ by default where it applies: NVFP4 with calibration, unless `scales` is `amax`.
    ignore_worst: leave in BF16 the layers that hurt most, up to this share of the weights (see
    `mixquant.offline.ignore_worst`). overwrite: replace a folder that mixquant wrote, once the new one is complete.
    device: where to compute, by default CUDA where there is one. progress: wraps the list of units, and before it the
    batches that the worst layers are measured on, for a progress bar.
    Raises InputError for unsupported input; nothing is then left of `output` but what was there.

    >>> import mixquant
    >>> result = mixquant.quantize("demo", "fp8", output="demo-fp8", calibration=None)
    >>> result.format, sorted(result.errors)
    ('fp8', ['amax'])
    """
    recipe = Recipe(
        policy=Policy.parse(policy), fold=fold, gptq=gptq, calibration=None if calibration is None else str(calibration)
    )
    target, where = Path(output), parse_device(device)
    check_output(target, overwrite)
    if recipe.calibration is not None:
        calibration_text.check(recipe.calibration)
    if ignore_worst is not None:
        sensitivity.check_share(ignore_worst)
    partial = Partial(target)
    with partial.locked():
        if isinstance(model, (str, Path)):
            request = Request.open(find(model), recipe, ignore_worst, where)
        else:
            copy = _saved(model, partial, with_tokenizer=recipe.calibrates or ignore_worst is not None)
            request = Request.open(copy, recipe, ignore_worst, where, original=model.name_or_path)
        request.check_output(target)
        partial.begin(request.sidecar(request.base, {}), len(request.source.units), request.ships_decode)
        if ignore_worst is None:
            return _Run(request, partial, {}).to_end(progress)
        table = _measured(request, partial, progress)
        worst = sensitivity.choose_ignored(table["phase"], ignore_worst)
        return _Run(request.ignoring(worst), partial, table).to_end(progress)


def _saved(model: ModelInMemory, partial: Partial, with_tokenizer: bool) -> Found:
    """The folder with a copy of a model that is in memory."""
    folder = partial.copy_of(model)
    if with_tokenizer:
        load_tokenizer(find(model.name_or_path)).save_pretrained(folder)
    return find(folder)


def _measured(request: Request, partial: Partial, progress: Progress) -> Sensitivity:
    """What each group of layers does alone, arm by arm; measured once, however often the run is resumed."""
    rows = partial.noted(SENSITIVITY)
    if rows is None:
        policy = request.ignoring(request.source.kept).recipe.policy
        table = measure_layers(request.model, policy, request.device, progress)
        rows = {"by_layer": {arm: [group.to_dict() for group in groups] for arm, groups in table.items()}}
        partial.note(SENSITIVITY, rows)
    return {arm: [GroupError.from_dict(row) for row in found] for arm, found in rows["by_layer"].items()}


class _Run:
    """A request on its way into DIR.partial, unit by unit."""

    def __init__(self, request: Request, partial: Partial, sensitivity: Sensitivity) -> None:
        self.request, self.partial, self.sensitivity = request, partial, sensitivity
        self.recipe, self.source, self.device = request.recipe, request.source, request.device

    def to_end(self, progress: Progress) -> Result:
        """Do what is not done yet, and put the folder in its place."""
        texts = self.request.texts
        with nullcontext() if texts is None else LayerStream(self.source, texts, self.device) as stream:
            for index, unit in enumerate(progress(self.source.units)):
                self._do(index, unit, stream)
        return self._publish()

    def _do(self, index: int, unit: Unit, stream: LayerStream | None) -> None:
        done, statistics = self.partial.has(index), None
        if unit.name and not done:
            check_tensors({name: self.source.tensor(name) for name in unit.tensors})
        if stream is not None and unit.name:
            statistics = stream.advance(unit, bool(self.recipe.gptq), watch=not done)
        if not done:
            self._write(index, unit, statistics)

    @torch.no_grad()
    def _write(self, index: int, unit: Unit, statistics: Statistics | None) -> None:
        tensors = {name: self.source.tensor(name) for name in unit.tensors}
        if unit.groups:
            tensors = {name: tensor.to(self.device, copy=self.recipe.fold) for name, tensor in tensors.items()}
        layers = quantize_layers(tensors, unit.groups, statistics, self.recipe)
        quantized: dict[str, Tensor] = dict(tensors)
        for layer, weight in layers.weights.items():
            del quantized[f"{layer}.weight"]
            quantized |= compressed(layer, weight, layers.activation_scales.get(layer))
        self.partial.save(index, quantized, tensors, layers.errors)

    def _publish(self) -> Result:
        self.partial.index()
        folder = QuantizedFolder(self.partial.path)
        result = Result(
            folder=self.partial.output,
            format=self.recipe.format,
            errors=mean_errors(self.partial.errors, self.recipe.steps),
            calibrated=self.request.texts is not None,
            notes=self._notes(),
            prefill_bytes=sum(folder.describe(layer).bytes for layer in self.source.targets),
            decode_bytes=self.source.bytes,
            sensitivity=self.sensitivity,
        )
        decode = self.request.base
        if self.request.ships_decode:
            decode = DecodeModel(DECODE, hash=fingerprint(self.partial.path / DECODE))
        sidecar = self.request.sidecar(decode, {"errors": {"of": result.measured, "mean": result.errors}})
        config = quantization_config(self.recipe.format, self.source.unquantized)
        self.partial.finish(self.source.folder, sidecar, config, card.text(result, sidecar, self.request.base.model))
        return result

    def _notes(self) -> list[str]:
        notes = []
        if share := self.source.experts:
            notes += [
                f"{share:.0%} of the parameters are experts, which stay BF16; stock Transformers misses them here."
            ]
        notes += [f"{layer} stays BF16: {reason}." for layer, reason in self.source.kept.items()]
        unfolded = [group for group in self.request.groups if self.recipe.fold and group.producer is None]
        return notes + [f"The input of {group.layers[0]} is not folded: {group.reason}." for group in unfolded]
