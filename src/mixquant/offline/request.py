"""What one call of `quantize` asks for, with everything that can be refused refused before a tensor is computed.

A request is complete when the run begins, and nothing of it changes under way. Layers that are found to hurt most and
stay BF16 make a new request out of it, before the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

import mixquant
from mixquant.checkpoint.locate import Found
from mixquant.checkpoint.sidecar import DecodeModel, Sidecar
from mixquant.errors import InputError
from mixquant.formats import FORMATS
from mixquant.integrations.transformers.loading import context_window, load_tokenizer
from mixquant.offline import calibration_text
from mixquant.offline.calibration_text import Texts
from mixquant.offline.groups import Group
from mixquant.offline.recipe import Recipe
from mixquant.offline.source import Source

TOKENS = 65_536
TOKENS_PER_CHANNEL = 16
"""Calibration text: so many tokens for each channel of the widest input, and at least `TOKENS`."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A recipe for a model.

    model: as it was found; a copy of one that was in memory. recipe: its policy ignores all layers that stay
    BF16; asked: only those that the user named. ignore_worst: the share of the weights that may stay BF16 besides.
    base: the BF16 model, as the model card calls it. ships_decode: whether the folder brings a BF16 model along.
    """

    model: Found
    recipe: Recipe
    asked: tuple[str, ...]
    ignore_worst: float | None
    device: torch.device
    source: Source
    texts: Texts | None
    base: DecodeModel
    ships_decode: bool

    @classmethod
    def open(
        cls, model: Found, recipe: Recipe, ignore_worst: float | None, device: torch.device, original: str | None = None
    ) -> Request:
        """Read the model's headers and the calibration text.

        original: what a model in memory was loaded from. The folder ships it, because it may have been changed since.
        """
        source = Source.open(model, recipe.policy)
        base = source.decode_model if original is None else replace(source.decode_model, model=original)
        request = cls(
            model=model,
            recipe=recipe,
            asked=recipe.policy.ignore,
            ignore_worst=ignore_worst,
            device=device,
            source=source,
            texts=_read_texts(model, recipe, source) if recipe.calibrates else None,
            base=base,
            ships_decode=recipe.fold or original is not None,
        )
        if recipe.fold and not any(group.producer for group in request.groups):
            raise InputError(
                f"No layer of {model.name} can be folded: {next(request.groups).reason}: leave folding out."
            )
        return request

    def check_output(self, output: Path) -> None:
        """Raise InputError where the model stands in the folder that would be replaced."""
        folder = self.source.folder.resolve()
        if output.resolve() in (folder, *folder.parents):
            raise InputError(f"{output} holds the model itself: name another output folder.")

    def ignoring(self, layers: Iterable[str]) -> Request:
        """The same with more layers that stay BF16."""
        policy = replace(self.recipe.policy, ignore=(*self.recipe.policy.ignore, *layers))
        return replace(self, recipe=replace(self.recipe, policy=policy), source=Source.open(self.model, policy))

    @property
    def groups(self) -> Iterator[Group]:
        return (group for unit in self.source.units for group in unit.groups)

    def sidecar(self, decode: DecodeModel, outcome: dict[str, Any]) -> Sidecar:
        """`mixquant.json`: `recipe` tells one run from another, `outcome` and the policy say what came of it."""
        recipe = {
            "base_model": asdict(self.base),
            "format": self.recipe.format,
            "ignore": list(self.asked),
            "ignore_worst": self.ignore_worst,
            "scales": self.recipe.policy.scales if FORMATS[self.recipe.format].block else None,
            "fold": self.recipe.fold,
            "gptq": self.recipe.gptq,
            "calibration": None if self.texts is None else self.texts.to_dict(),
            "kept": self.source.kept,
            "mixquant": mixquant.__version__,
            "torch": torch.__version__,
            "device": self.device.type,
        }
        return Sidecar(self.recipe.policy, decode, recipe | outcome)


def _read_texts(model: Found, recipe: Recipe, source: Source) -> Texts:
    context = context_window(source.model.config)
    tokens = max(TOKENS, TOKENS_PER_CHANNEL * source.widest)
    return calibration_text.read(cast(str, recipe.calibration), load_tokenizer(model), context, tokens)
