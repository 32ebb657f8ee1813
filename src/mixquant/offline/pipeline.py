"""mixquant.quantize: a BF16 checkpoint in, a quantized folder that everybody can load out.

    mixquant.quantize("Qwen/Qwen3-8B", "nvfp4", output="Qwen3-8B-NVFP4")

The checkpoint is read, and the folder written, one decoder layer after another. Whatever the model's size, memory holds
one decoder layer in float32, and with calibration the hidden states of the calibration text; with GPTQ also the mean
of x x^T for each input of that one layer, and one more matrix as large as the largest of them. Without calibration no
model runs at all. Leaving the most sensitive layers in BF16 is the exception: to find them the whole model is loaded.

The folder is plain compressed-tensors, which stock vLLM serves as a uniformly quantized model; `mixquant.json` beside
it names the BF16 model that answers. Folding changes what stands in the KV cache, so a folded folder brings its own
BF16 model along, in `decode/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import mixquant
from mixquant.checkpoint.locate import Found, find
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.sidecar import DecodeModel, Sidecar, fingerprint
from mixquant.devices import parse_device
from mixquant.errors import InputError
from mixquant.formats import FORMATS
from mixquant.integrations.transformers import sensitivity
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.integrations.transformers.sensitivity import GroupError
from mixquant.offline import card, spare, texts, write
from mixquant.offline.calibrate import LayerStream
from mixquant.offline.groups import Group
from mixquant.offline.partial import DECODE, Partial, check_output
from mixquant.offline.result import Result
from mixquant.offline.source import Source, Unit
from mixquant.offline.steps import Recipe, Statistics, check_tensors, mean_errors, quantize_layers
from mixquant.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 65_536
TOKENS_PER_CHANNEL = 16
"""Calibration text: so many tokens for each channel of the widest input, and at least `TOKENS`."""

SENSITIVITY = "sensitivity.json"
"""What `budget` chose layers by: the report's rows, arm by arm."""

Progress = Callable[[Sequence[Any]], Iterable[Any]]


def quantize(
    model: str | Path | PreTrainedModel,
    policy: Policy | str | Mapping[str, Any] = "nvfp4",
    *,
    output: str | Path,
    calibration: str | Path | None = texts.AGENTS,
    fold: bool = False,
    gptq: bool | None = None,
    budget: float | None = None,
    overwrite: bool = False,
    device: str | None = None,
    progress: Progress = lambda units: units,
) -> Result:
    """Write the quantized folder `output`; a run that was killed goes on where it stopped.

    model: a BF16 model's folder or hub id, `demo`, or a Transformers model in memory, which is then saved into
    `output/decode`. policy: a preset's name, a Policy, or a mapping of its fields; `scales` and `ignore` count too.
    calibration: `agents`, a text or JSONL file (see `mixquant.offline.texts`), or None. fold, gptq: further steps of
    the recipe; GPTQ by default where it applies: NVFP4 with calibration, unless `scales` is `amax`. budget: leave in
    BF16 the layers that hurt most, up to this share of the weights (see `mixquant.offline.spare`). overwrite: replace
    a folder that mixquant wrote, once the new one is complete. device: where to compute, by default CUDA where there is
    one. progress: wraps the list of units, and before it the batches that a budget is measured on, for a progress bar.
    Raises InputError for unfit input; nothing is then left of `output` but what was there.

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
        texts.check(recipe.calibration)
    if budget is not None:
        sensitivity.check_budget(budget)
    partial = Partial(target)
    with partial.locked():
        if isinstance(model, (str, Path)):
            return _Run(find(model), recipe, partial, where, budget).to_end(progress)
        folder = partial.copy_of(model)
        if recipe.calibrates or budget is not None:
            load_tokenizer(find(model.name_or_path)).save_pretrained(folder)
        return _Run(find(folder), recipe, partial, where, budget, original=model.name_or_path).to_end(progress)


class _Run:
    """One call of `quantize`; what can be refused is refused before a tensor is computed.

    original: what a model in memory was loaded from; it is written to `decode/`, because it may have been changed.
    """

    def __init__(
        self,
        found: Found,
        recipe: Recipe,
        partial: Partial,
        device: torch.device,
        budget: float | None,
        original: str | None = None,
    ) -> None:
        self.found, self.recipe, self.partial, self.device, self.budget = found, recipe, partial, device, budget
        self.asked = recipe.policy
        self.source = Source.open(found, recipe.policy)
        folder = self.source.folder.resolve()
        if partial.output.resolve() in (folder, *folder.parents):
            raise InputError(f"{partial.output} holds the model itself: name another output folder.")
        if recipe.fold and not any(group.producer for group in self._groups()):
            raise InputError(
                f"No layer of {found.name} can be folded: {next(self._groups()).reason}: leave folding out."
            )
        self.base = self.source.decode_model
        if original is not None:
            self.base = replace(self.base, model=original)
        self.ships_decode = recipe.fold or original is not None
        self.texts = self._read_texts() if recipe.calibrates else None
        self.sensitivity: dict[str, list[GroupError]] = {}

    def to_end(self, progress: Progress) -> Result:
        """Do what is not done yet, and put the folder in its place."""
        self.partial.begin(self._sidecar(self.base, {}), len(self.source.units), self.ships_decode)
        if self.budget is not None:
            self._spare(self.budget, progress)
        stream = None if self.texts is None else LayerStream(self.source, self.texts, self.device)
        for index, unit in enumerate(progress(self.source.units)):
            self._do(index, unit, stream)
        return self._publish()

    def _spare(self, budget: float, progress: Progress) -> None:
        """Leave the layers that hurt most in BF16; they are measured once, however often the run is resumed."""
        rows = self.partial.noted(SENSITIVITY)
        if rows is None:
            policy = replace(self.asked, ignore=(*self.asked.ignore, *self.source.kept))
            table = spare.measure_layers(self.found, policy, self.device, progress)
            rows = {"by_layer": {arm: [group.to_dict() for group in groups] for arm, groups in table.items()}}
            self.partial.note(SENSITIVITY, rows)
        by_layer = rows["by_layer"].items()
        self.sensitivity = {arm: [sensitivity.GroupError.from_dict(row) for row in found] for arm, found in by_layer}
        chosen = sensitivity.choose_ignored(self.sensitivity["phase"], budget)
        policy = replace(self.asked, ignore=(*self.asked.ignore, *chosen))
        self.recipe, self.source = replace(self.recipe, policy=policy), Source.open(self.found, policy)

    def _do(self, index: int, unit: Unit, stream: LayerStream | None) -> None:
        done, statistics = self.partial.has(index), None
        if unit.name and not done:
            check_tensors({name: self.source.tensor(name) for name in unit.tensors})
        if stream is not None and unit.name:
            statistics = stream.advance(unit, bool(self.recipe.gptq), watch=not done)
        if not done:
            self._write(index, unit, statistics)

    def _read_texts(self) -> texts.Texts:
        context = getattr(self.source.model.config.get_text_config(), "max_position_embeddings", None)
        tokens = max(TOKENS, TOKENS_PER_CHANNEL * self.source.widest)
        return texts.read(cast(str, self.recipe.calibration), load_tokenizer(self.found), context, tokens)

    @torch.no_grad()
    def _write(self, index: int, unit: Unit, statistics: Statistics | None) -> None:
        tensors = {name: self.source.tensor(name) for name in unit.tensors}
        if unit.groups:
            tensors = {name: tensor.to(self.device, copy=self.recipe.fold) for name, tensor in tensors.items()}
        layers = quantize_layers(tensors, unit.groups, statistics, self.recipe)
        quantized: dict[str, Tensor] = dict(tensors)
        for layer, weight in layers.weights.items():
            del quantized[f"{layer}.weight"]
            quantized |= write.compressed(layer, weight, layers.activation_scales.get(layer))
        self.partial.save(index, quantized, tensors, layers.errors)

    def _publish(self) -> Result:
        self.partial.index()
        folder = QuantizedFolder(self.partial.path)
        result = Result(
            folder=self.partial.output,
            format=self.recipe.format,
            errors=mean_errors(self.partial.errors, self.recipe.steps),
            calibrated=self.texts is not None,
            notes=self._notes(),
            prefill_bytes=sum(folder.describe(layer).bytes for layer in self.source.targets),
            decode_bytes=sum(self.source.tensor(name).nbytes for name in self.source.files),
            sensitivity=self.sensitivity,
        )
        decode = self.base
        if self.partial.ships_decode:
            decode = DecodeModel(DECODE, hash=fingerprint(self.partial.path / DECODE))
        sidecar = self._sidecar(decode, {"errors": {"of": result.measured, "mean": result.errors}})
        config = write.quantization_config(self.recipe.format, self.source.unquantized)
        self.partial.finish(self.source.folder, sidecar, config, card.text(result, sidecar, self.base.model))
        return result

    def _groups(self) -> Iterator[Group]:
        return (group for unit in self.source.units for group in unit.groups)

    def _notes(self) -> list[str]:
        notes = []
        if share := self.source.experts:
            notes += [
                f"{share:.0%} of the parameters are experts, which stay BF16; stock Transformers misses them here."
            ]
        notes += [f"{layer} stays BF16: {reason}." for layer, reason in self.source.kept.items()]
        unfolded = [group for group in self._groups() if self.recipe.fold and group.producer is None]
        return notes + [f"The input of {group.layers[0]} is not folded: {group.reason}." for group in unfolded]

    def _sidecar(self, decode: DecodeModel, outcome: Mapping[str, Any]) -> Sidecar:
        """What `mixquant.json` says; all of the recipe but its outcome tells one run from another."""
        recipe = {
            "base_model": asdict(self.base),
            "ignore": list(self.asked.ignore),
            "budget": self.budget,
            "scales": self.recipe.policy.scales if FORMATS[self.recipe.format].block else None,
            "fold": self.recipe.fold,
            "gptq": self.recipe.gptq,
            "calibration": None if self.texts is None else self.texts.to_dict(),
            "kept": self.source.kept,
            "mixquant": mixquant.__version__,
            "torch": torch.__version__,
            "device": self.device.type,
        }
        return Sidecar(self.recipe.policy, decode, recipe | dict(outcome))
