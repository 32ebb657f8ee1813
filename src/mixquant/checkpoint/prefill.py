"""Prefill weights from a quantized folder: what it determines of a policy, and whether it belongs to the BF16 model.

    weights = PrefillWeights("Qwen3-8B-NVFP4")
    weights.check_decode_model("Qwen3-8B")
    weights.read("model.layers.0.mlp.up_proj", bf16_weight)

A phase-aware model reads its prompt with one set of weights and answers with another, over one KV cache, so both must
be one model. Where the folder's `mixquant.json` names the BF16 model, its hash is compared; and every quantized weight
must be a copy of its BF16 weight, which is all that folders of other tools can be told by.

The folder decides the format, and which layers stay BF16 beyond `ignore`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mixquant.checkpoint.locate import fetch
from mixquant.checkpoint.quantized import QuantizedFolder, StoredLayer
from mixquant.checkpoint.sidecar import Sidecar, find_sidecar
from mixquant.errors import InputError
from mixquant.formats import Quantized
from mixquant.layers import NEVER, is_ignored
from mixquant.policy import Policy


class PrefillWeights:
    """A quantized folder, or hub id, for a model with the same layers. Raises InputError where it holds none.

    Checkpoints of multimodal models put prefixes of their own before the decoder's names: a layer that is not found by
    its name is found by what follows `layers.` in it.
    """

    def __init__(self, folder: str | Path | QuantizedFolder) -> None:
        self.folder = folder if isinstance(folder, QuantizedFolder) else QuantizedFolder(fetch(str(folder)))
        self.sidecar: Sidecar | None = find_sidecar(self.folder.path)
        self._decoder = {_decoder_name(layer): layer for layer in self.folder.layers() if not is_ignored(layer, NEVER)}

    def resolve(self, asked: Policy | None) -> Policy:
        """The policy asked for, or else the one that the folder was made for, with the folder's format."""
        made_for = self.sidecar.policy if self.sidecar else Policy()
        return resolve_policy(asked or made_for, self.folder)

    def check_decode_model(self, folder: str | Path) -> None:
        """Raise InputError where `mixquant.json` names another BF16 model than the one in `folder`."""
        if self.sidecar is not None and self.sidecar.decode_model is not None:
            self.sidecar.decode_model.located(self.folder.path).check(folder)

    def ignored(self, layers: Iterable[str]) -> tuple[str, ...]:
        """Which of the model's linear layers the folder left in BF16."""
        return tuple(layer for layer in layers if self.folder.format(self._find(layer)) == "bf16")

    def read(self, layer: str, weight: Tensor) -> StoredLayer:
        """The quantized copy of a layer's BF16 weight [N, K], on its device."""
        stored = self.folder.read(self._find(layer), weight.device)
        check_copy(stored.weight, weight, self.folder.path)
        return stored

    def _find(self, layer: str) -> str:
        found = layer if layer in self.folder else self._decoder.get(_decoder_name(layer))
        if found is None:
            raise missing_layer(layer, self.folder.path)
        return found


def resolve_policy(policy: Policy, folder: QuantizedFolder) -> Policy:
    """A policy with the folder's format where it says auto; InputError where it asks for another one."""
    if len(folder.formats) > 1:
        raise InputError(f"{folder.path} mixes {' and '.join(sorted(folder.formats))}: use a folder of one format.")
    folder.check_activation_scales()
    (format,) = folder.formats
    prefill, decode = (format if asked == "auto" else asked for asked in (policy.prefill, policy.decode))
    if other := {prefill, decode} - {format, "bf16"}:
        raise InputError(
            f"{folder.path} holds {format} and the policy asks for {other.pop()}: ask for {format}, or for no format."
        )
    return replace(policy, prefill=prefill, decode=decode)


def check_copy(quantized: Quantized, weight: Tensor, folder: Path) -> None:
    """Raise InputError where a quantized weight is no copy of the original [N, K]."""
    if not is_copy(quantized, weight):
        raise InputError(
            f"its weight in {folder} is not a quantized copy of the BF16 model's: name the folder and the model that "
            "belong together (where scales were folded into norms, the model has them too)."
        )


def is_copy(quantized: Quantized, weight: Tensor) -> bool:
    """Whether a quantized weight is a copy of the original [N, K], by at most 64 of its rows.

    Distance does not tell: rounding alone errs by 1 % of the squared weight, but GPTQ may move the weights of channels
    that are small beside an outlier by as much as they are. What it adds has nothing to do with them, though. So each
    row, and each column, of a copy is the original's times 1, plus noise; a row of another model is it times 0, a
    folded one times another factor. Rows and columns count by their power, because blocks round the smallest to 0.
    """
    if quantized.shape != tuple(weight.shape):
        return False
    sample = slice(None, None, max(1, weight.shape[0] // 64))
    original, found = weight[sample].float(), quantized.rows(sample).dequantize()
    return all(_has_its_factors(found, original, dim) for dim in (0, 1))


def _has_its_factors(found: Tensor, original: Tensor, dim: int) -> bool:
    """Whether lines along `dim` are the original's times 1: but for lines with a tenth of the power.

    The factor is that of least squares, and its tolerance 0.25 and three of its standard errors; 0 never fits.
    """
    squares = original.square().sum(dim, keepdim=True)
    divisor = squares.clamp(min=torch.finfo(torch.float32).tiny)
    factor = (found * original).sum(dim, keepdim=True) / divisor
    noise = (found - factor * original).square().sum(dim, keepdim=True) / divisor / original.shape[dim]
    fits = (factor - 1).abs() <= (0.25 + 3 * noise.sqrt()).clamp(max=0.9)
    power = squares + found.square().sum(dim, keepdim=True)
    return bool((power * ~fits).sum() <= 0.1 * power.sum())


def missing_layer(layer: str, folder: Path) -> InputError:
    """What a folder without one of the model's layers is refused with."""
    return InputError(f"{folder} has no layer {layer}: use a folder quantized from this model.")


def _decoder_name(layer: str) -> str:
    return layer[max(layer.find("layers."), 0) :]
