"""The safetensors files of a checkpoint's folder, and what their headers say.

A file begins with the size of its header in 8 bytes and the header itself, a JSON object that gives each tensor's
dtype, shape and place. The last place must be the file's end, so a truncated file shows without reading its data, and
a folder of 100 GB is checked in a fraction of a second.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mixquant.errors import InputError
from mixquant.files import read_object

INDEX = "model.safetensors.index.json"
REMEDY = "download the model again"


@dataclass(frozen=True)
class TensorHeader:
    """Where a tensor is. dtype: safetensors' name for it. bytes: of its data."""

    file: Path
    dtype: str
    shape: list[int]
    bytes: int


Headers = dict[str, TensorHeader]
"""The headers of a folder's tensors by their full names."""


def weight_files(folder: Path) -> list[Path]:
    """A checkpoint's safetensors files: those its index names, or all. InputError where one is missing."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"{folder} has no safetensors weights: {_remedy(folder)}.")
        return files
    shards = read_object(index, REMEDY).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{index} has no weight_map from tensors to files: {REMEDY}.")
    files = sorted({folder / name for name in shards.values()})
    if absent := next((file for file in files if not file.is_file()), None):
        raise InputError(f"{folder} lacks the shard {absent.name}: download it.")
    return files


def _remedy(folder: Path) -> str:
    gguf = next(folder.glob("*.gguf"), None)
    if gguf is None:
        return "convert or download them first"
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, gguf_file={gguf.name!r}, dtype='bfloat16')"
    return f"GGUF is not read, so download the original checkpoint, or convert it by {load}.save_pretrained(DIR)"


def read_headers(folder: Path) -> Headers:
    """The headers of all tensors in `folder`, each file opened once. InputError where a file is damaged, or none has a
    tensor."""
    headers = {name: header for file in weight_files(folder) for name, header in file_headers(file).items()}
    if not headers:
        raise InputError(f"{folder} holds no tensors: {REMEDY}.")
    return headers


def stored_dtype(folder: Path) -> str:
    """The dtype of most bytes of a checkpoint, by its name in safetensors: BF16, F16, F32, ..."""
    sizes: Counter[str] = Counter()
    for header in read_headers(folder).values():
        sizes[header.dtype] += header.bytes
    return sizes.most_common(1)[0][0]


def file_headers(file: Path) -> Headers:
    """The headers of all tensors in a file. InputError where it is damaged."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            entries: dict[str, Any] = json.loads(stream.read(min(length, size)))
        entries.pop("__metadata__", None)
        headers = {name: _header(file, entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError, OverflowError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__} in its header): download it again.") from None
    if 8 + length + end != size:
        raise InputError(f"{file} is truncated or damaged ({size} bytes, not {8 + length + end}): download it again.")
    return headers


def _header(file: Path, entry: dict[str, Any]) -> TensorHeader:
    start, end = entry["data_offsets"]
    return TensorHeader(file, str(entry["dtype"]), [int(size) for size in entry["shape"]], end - start)


@contextmanager
def undamaged(file: Path) -> Iterator[None]:
    """Turns what safetensors says of a file that it cannot read into one sentence."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file} is damaged ({reason}): {REMEDY}.") from None
