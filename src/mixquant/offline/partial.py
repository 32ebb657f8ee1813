"""DIR.partial: the folder of a run that is not finished, so that a checkpoint is whole or not there.

A run works in DIR.partial and renames it to DIR when everything is in it. Each unit (a decoder layer, or the rest) is
one safetensors shard that is written beside its name, flushed to the disk, and renamed: a unit is done if its shard
is there. `mixquant.json` comes first and says which run the folder belongs to; `config.json`, without which nothing
loads a folder, comes last.

    mixquant.json                      policy, BF16 model, recipe
    errors.json                        errors of each linear layer, step by step
    model-00001-of-00009.safetensors   one a unit, and their index
    decode/                            the folded BF16 model, likewise, where scales were folded
    config.json, tokenizer, README.md

and, until it is finished, `source/` with a copy of a model that was in memory, and `replaced/` with what stood in DIR.
Nothing is removed or replaced that mixquant did not write, and nothing outside of DIR and DIR.partial is touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mixquant.checkpoint.locate import SETTINGS
from mixquant.checkpoint.sidecar import SIDECAR, Sidecar, read_sidecar
from mixquant.errors import InputError
from mixquant.offline.write import flush, shard_index, write_json, write_shard, write_text, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DECODE = "decode"
ERRORS = "errors.json"
SOURCE = "source"
REPLACED = "replaced"
INDEX = "model.safetensors.index.json"
_WRITTEN = ("config.json", INDEX, SIDECAR, ERRORS)
_FIRST = f"{SIDECAR}.tmp"
"""All that a run may have left in DIR.partial which was killed before `mixquant.json` was there."""

Errors = dict[str, dict[str, float]]


def check_output(output: Path, overwrite: bool) -> None:
    """Raise InputError where something stands in the way, at DIR or DIR.partial, that may not be replaced."""
    if output.name in ("", ".."):
        raise InputError(f"{output} is no name for a folder of its own: name another folder.")
    if output.exists() and not overwrite:
        raise InputError(f"{output} exists: name another folder, or replace it with --overwrite.")
    if output.exists() and not _holds_weights_of_ours(output):
        raise InputError(
            f"{output} was not written by `mixquant quantize`, so it is not replaced: name another folder."
        )
    partial = output.with_name(f"{output.name}.partial")
    strangers = partial.exists() and not (partial / SIDECAR).is_file()
    if strangers and (not partial.is_dir() or {file.name for file in partial.iterdir()} - {_FIRST}):
        raise InputError(
            f"{partial} was not written by mixquant, which needs the name: move it, or name another folder."
        )


def _holds_weights_of_ours(folder: Path) -> bool:
    """`save_pretrained` of a converted model leaves a `mixquant.json` too, but beside weights that are the user's."""
    return (folder / SIDECAR).is_file() and read_sidecar(folder).decode_model is not None


class Partial:
    """DIR.partial; `check_output` has found that it may be used."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.partial")
        self.units = 0
        self.ships_decode = False
        self.errors: Errors = {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other runs out: two in one folder would take each other's files.

        The lock goes with the process, however that ends. Should the run be refused before it began, the folder goes.
        """
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise InputError(f"Another run is writing {self.path}: wait for it, or end it.") from None
        try:
            self._clear(SOURCE)
            yield
        finally:
            self._clear(SOURCE)
            if not (self.path / SIDECAR).is_file():
                self._clear(_FIRST)
                with suppress(OSError):  # not empty
                    for folder in made or [self.path]:
                        folder.rmdir()
            os.close(lock)

    def copy_of(self, model: PreTrainedModel) -> Path:
        """A folder with a model that is in memory; it goes when the run ends, or when the next one begins."""
        with writing(self.path):
            model.save_pretrained(self.path / SOURCE)
        return self.path / SOURCE

    def begin(self, sidecar: Sidecar, units: int, ships_decode: bool) -> None:
        """Start, or go on with a run of the same recipe; InputError where the folder is another run's."""
        self.units, self.ships_decode = units, ships_decode
        with writing(self.path):
            if (self.path / SIDECAR).is_file():
                self._check_recipe(read_sidecar(self.path), sidecar)
            else:
                write_json(self.path / SIDECAR, sidecar.to_dict())
            for folder in (self.path, self.path / DECODE):
                for half in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):  # ours, and safetensors' own
                    half.unlink()
            if ships_decode:
                (self.path / DECODE).mkdir(exist_ok=True)
        if (self.path / ERRORS).is_file():
            self.errors = json.loads((self.path / ERRORS).read_text(encoding="utf-8"))

    def has(self, index: int) -> bool:
        """Whether a unit is done."""
        return self._shard(self.path, index).is_file()

    def save(self, index: int, tensors: Mapping[str, Tensor], decode: Mapping[str, Tensor], errors: Errors) -> None:
        """Write a unit's shards; the quantized one comes last."""
        with writing(self.path):
            if self.ships_decode:
                write_shard(self._shard(self.path / DECODE, index), decode)
            self.errors |= errors
            write_json(self.path / ERRORS, self.errors)
            write_shard(self._shard(self.path, index), tensors)

    def noted(self, name: str) -> dict[str, Any] | None:
        """A further JSON document of the run, or None if it is not there yet."""
        path = self.path / name
        document: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return document

    def note(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a further JSON document into the folder."""
        with writing(self.path):
            write_json(self.path / name, document)

    def index(self) -> None:
        """Say which shard has which tensor, when all units are done."""
        with writing(self.path):
            for folder in (self.path, self.path / DECODE) if self.ships_decode else (self.path,):
                write_json(folder / INDEX, shard_index([self._shard(folder, unit) for unit in range(self.units)]))

    def finish(self, source: Path, sidecar: Sidecar, quantization: Mapping[str, Any], card: str) -> None:
        """Write what makes the shards a checkpoint, and put it in the place of `output`."""
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        with writing(self.path):
            write_json(self.path / SIDECAR, sidecar.to_dict())
            write_text(self.path / "README.md", card)
            if self.ships_decode:
                self._complete(self.path / DECODE, source, config)
            self._complete(self.path, source, config | {"quantization_config": quantization})
            self._publish()

    def _complete(self, folder: Path, source: Path, config: Mapping[str, Any]) -> None:
        """Tokenizer and settings; the configuration last."""
        for file in (file for pattern in SETTINGS for file in source.glob(pattern)):
            if file.name not in _WRITTEN:
                shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", config)

    def _publish(self) -> None:
        """Two renames where the output is replaced: the new checkpoint, by then complete, takes the old one in."""
        self._clear(SOURCE)
        if self.output.exists():
            self._clear(REPLACED)
            self.output.rename(self.path / REPLACED)
        self._clear(REPLACED)
        self.path.rename(self.output)
        flush(self.output.parent)

    def _clear(self, name: str) -> None:
        path = self.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def _shard(self, folder: Path, index: int) -> Path:
        return folder / f"model-{index + 1:05}-of-{self.units:05}.safetensors"

    def _check_recipe(self, found: Sidecar, wanted: Sidecar) -> None:
        """The recipe says what was asked for; in the policy, `ignore` may by now name what was chosen."""
        before, now = (_flat({"policy": s.policy.to_dict(), "recipe": dict(s.recipe)}) for s in (found, wanted))
        for key in sorted((before.keys() | now.keys()) - {"policy.ignore"}):
            if not key.startswith("recipe.errors.") and before.get(key) != now.get(key):
                raise InputError(
                    f"{self.path} is of an unfinished run with another recipe ({key} was {before.get(key)!r}, now "
                    f"{now.get(key)!r}): repeat that run, or delete the folder."
                )


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
