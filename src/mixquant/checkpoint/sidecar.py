"""`mixquant.json`: what stands beside a saved model, and says how to run it in two precisions.

    policy         the policy that the folder was made for
    decode_model   for a folder of quantized weights: the BF16 model whose prompts they read
    recipe         how they were made

The checkpoint itself stays what every tool reads; nothing of ours goes into config.json, where a Transformers without
mixquant would meet an unknown method, warn, and load something else than was meant.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from mixquant.checkpoint.shards import undamaged, weight_files
from mixquant.errors import InputError
from mixquant.files import read_object, write_json
from mixquant.policy import Policy

SIDECAR = "mixquant.json"

REMEDY = "save the model again, or name a policy"


@dataclass(frozen=True)
class DecodeModel:
    """The BF16 model of a quantized folder.

    model: a hub id, or a folder; a relative one is looked for inside the quantized folder first.
    revision: the hub's. hash: its `fingerprint`, which loaders compare.
    """

    model: str
    revision: str | None = None
    hash: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not all(isinstance(v, str | None) for v in (self.revision, self.hash)):
            raise TypeError("model, revision and hash are text")

    def located(self, folder: str | Path) -> DecodeModel:
        """The same model as seen from the quantized `folder`: one that stands inside is named by its path."""
        inside = Path(folder) / self.model
        return replace(self, model=str(inside)) if inside.is_dir() else self

    def check(self, folder: str | Path) -> None:
        """Raise InputError where the model in `folder` is another one."""
        if self.hash is not None and fingerprint(folder) != self.hash:
            raise InputError(
                f"{folder} is not the BF16 model that the quantized weights belong to: use {self.model}"
                f"{f' at revision {self.revision}' if self.revision else ''}, or quantize {folder} itself."
            )


@dataclass(frozen=True)
class Sidecar:
    """The content of `mixquant.json`."""

    policy: Policy
    decode_model: DecodeModel | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, document: Any, path: str | Path) -> Sidecar:
        """From the JSON document that was read at `path`; InputError where it is damaged."""
        try:
            decode, recipe = document.get("decode_model"), document.get("recipe", {})
            model = None if decode is None else DecodeModel(**decode)
            policy = Policy.parse({"tail": 1} | document["policy"])  # the default when policies were not written whole
            return cls(policy, model, dict(recipe))
        except InputError as error:  # the policy's own sentence
            raise InputError(f"{path}: {error}") from None
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{path} is damaged: {REMEDY}.") from None

    def to_dict(self) -> dict[str, Any]:
        document: dict[str, Any] = {"policy": self.policy.to_dict()}
        if self.decode_model is not None:
            document |= {"decode_model": asdict(self.decode_model), "recipe": dict(self.recipe)}
        return document


def write_sidecar(folder: str | Path, sidecar: Sidecar) -> None:
    """Write `mixquant.json` into `folder`, beside the model."""
    write_json(Path(folder) / SIDECAR, sidecar.to_dict())


def read_sidecar(folder: str | Path) -> Sidecar:
    """What stands beside a saved model; InputError where there is nothing or it is damaged."""
    path = Path(folder) / SIDECAR
    if not path.is_file():
        raise InputError(f"{path} does not exist: save a converted model there first, or name a policy.")
    return Sidecar.parse(read_object(path, REMEDY), path)


def find_sidecar(folder: str | Path) -> Sidecar | None:
    """What stands beside a saved model, or None where there is nothing."""
    return read_sidecar(folder) if (Path(folder) / SIDECAR).is_file() else None


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over every tensor's name, dtype, shape and first row: tells models apart in a fraction of a second.

    The first row of a matrix holds a value of each input channel, and a vector is its own first row: scales that were
    folded into a model change it. How the tensors are spread over files does not.
    """
    digests = {}
    for file in weight_files(Path(folder)):
        with undamaged(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_slice(name)
                shape = tensor.get_shape()
                row = tensor[:1, :1] if len(shape) > 2 else tensor[:1] if len(shape) == 2 else tensors.get_tensor(name)
                data = row.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                digests[name] = [tensor.get_dtype(), shape, hashlib.sha256(data).hexdigest()]
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
