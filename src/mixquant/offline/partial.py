"""DIR.partial: the folder of a run that is not finished, so that a checkpoint is whole or not there.

What: a run works in DIR.partial and renames it to DIR when everything is in it.

    mixquant.json                      policy, BF16 model, recipe
    errors.json                        errors of each linear layer, step by step
    model-00001-of-00009.safetensors   one a unit, and their index
    decode/                            the folded BF16 model, likewise, where scales were folded
    config.json, tokenizer, README.md

and, until it is finished, `run.lock`, `source/` with a copy of a model that was in memory, and `replaced/` with what
stood in DIR.

How: a unit (a decoder layer, or the rest) is one safetensors shard, whole or not there (`mixquant.files`), and it is
done if its shard is there. `mixquant.json` comes first and says which run the folder belongs to; `config.json`, without
which nothing loads a folder, comes last.

Trade-off: everything is on the disk twice while a folder is replaced, and each shard waits for the disk. In return a
kill costs one unit, and nothing is removed or replaced that mixquant did not write: nothing outside of DIR and
DIR.partial is touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from torch import Tensor

from mixquant.checkpoint.locate import SETTINGS
from mixquant.checkpoint.shards import INDEX
from mixquant.checkpoint.sidecar import SIDECAR, Sidecar, read_sidecar
from mixquant.errors import InputError
from mixquant.files import flush, lock, read_object, unlock, write_json, write_text, writing
from mixquant.offline.folder import shard_index, write_shard

DECODE = "decode"
ERRORS = "errors.json"
SOURCE = "source"
REPLACED = "replaced"
LOCK = "run.lock"
_HALF = f"{SIDECAR}.tmp"
"""This and the lock are all that a run may have left in DIR.partial which was killed before it had `mixquant.json`."""

_WRITTEN = ("config.json", INDEX, SIDECAR, ERRORS)
DAMAGED = "delete the folder, and run the same command again"

Errors = dict[str, dict[str, float]]


class ModelInMemory(Protocol):
    """What we use of a model that is not on the disk; those of Transformers have it."""

    name_or_path: str

    def save_pretrained(self, save_directory: Path) -> Any:
        """Write weights and configuration into a folder."""


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
    if strangers and (not partial.is_dir() or {file.name for file in partial.iterdir()} - {_HALF, LOCK}):
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
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            taken = lock(self.path / LOCK, f"Another run is writing {self.path}: wait for it, or end it.")
        try:
            self._clear(SOURCE)
            yield
        finally:
            self._clear(SOURCE)
            unlock(taken)
            if not (self.path / SIDECAR).is_file():
                self._clear(_HALF)
                with suppress(OSError):  # not empty
                    for folder in made or [self.path]:
                        folder.rmdir()

    def copy_of(self, model: ModelInMemory) -> Path:
        """A folder with a model that is in memory; it goes when the run ends, or when the next one begins."""
        with self._writing():
            model.save_pretrained(self.path / SOURCE)
        return self.path / SOURCE

    def begin(self, sidecar: Sidecar, units: int, ships_decode: bool) -> None:
        """Start, or go on with a run of the same recipe; InputError where the folder is another run's.

        sidecar: as asked for, before anything came of it.
        """
        self.units, self.ships_decode = units, ships_decode
        with self._writing():
            if (self.path / SIDECAR).is_file():
                self._check_recipe(read_sidecar(self.path).recipe, sidecar.recipe)
            else:
                write_json(self.path / SIDECAR, sidecar.to_dict())
            for folder in (self.path, self.path / DECODE):
                for half in (*folder.glob("*.tmp"), *folder.glob(".tmp*")):  # ours, and safetensors' own
                    half.unlink()
            if ships_decode:
                (self.path / DECODE).mkdir(exist_ok=True)
        self.errors = self.noted(ERRORS) or {}

    def has(self, index: int) -> bool:
        """Whether a unit is done."""
        return self._shard(self.path, index).is_file()

    def save(self, index: int, tensors: Mapping[str, Tensor], decode: Mapping[str, Tensor], errors: Errors) -> None:
        """Write a unit's shards; the quantized one comes last."""
        with self._writing():
            if self.ships_decode:
                write_shard(self._shard(self.path / DECODE, index), decode)
            self.errors |= errors
            write_json(self.path / ERRORS, self.errors)
            write_shard(self._shard(self.path, index), tensors)

    def noted(self, name: str) -> dict[str, Any] | None:
        """A further JSON document of the run, or None if it is not there yet."""
        path = self.path / name
        return read_object(path, DAMAGED) if path.is_file() else None

    def note(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a further JSON document into the folder."""
        with self._writing():
            write_json(self.path / name, document)

    def index(self) -> None:
        """Say which shard has which tensor, when all units are done."""
        with self._writing():
            for folder in (self.path, self.path / DECODE) if self.ships_decode else (self.path,):
                write_json(folder / INDEX, shard_index([self._shard(folder, unit) for unit in range(self.units)]))

    def finish(self, source: Path, sidecar: Sidecar, quantization: Mapping[str, Any], card: str) -> None:
        """Write what makes the shards a checkpoint, and put it in the place of `output`."""
        config = read_object(source / "config.json", "download the model again")
        with self._writing():
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
        self._clear(LOCK)  # it is still held, and the folder is complete without it
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

    def _check_recipe(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """What a recipe says beyond what was asked for came of the run: it tells no run from another."""
        for key, before, now in _differences(found, wanted):
            raise InputError(
                f"{self.path} is of an unfinished run with another recipe ({key} was {before!r}, now {now!r}): repeat "
                "that run, or delete the folder."
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        kept = "; finished layers are kept" if (self.path / SIDECAR).is_file() else ""
        with writing(self.path, f"make room or choose another place, and run the same command again{kept}"):
            try:
                yield
            except SafetensorError as error:
                raise OSError(f"{error}") from error  # a full disk, in the words of safetensors


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, found, wanted) for each key of `wanted`; nested keys are joined by dots."""
    for key, now in wanted.items():
        before = found.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from ((f"{key}.{part}", *values) for part, *values in _differences(before, now))
        elif before != now:
            yield key, before, now
