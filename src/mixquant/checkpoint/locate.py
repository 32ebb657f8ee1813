"""What MODEL stands for: a local folder, a hub id, or `demo`, with every way it can be unfit said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixquant.errors import InputError

if TYPE_CHECKING:
    pass

DEMO = Path(__file__).parents[1] / "demo" / "model"


def locate(name: str) -> str:
    """A folder's path or a hub id. Raises InputError for a folder without config or with damaged weights."""
    folder = DEMO if name == "demo" else Path(name)
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is not a folder: name a model folder, a hub id such as Qwen/Qwen3-0.6B, or demo.")
    return name


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{folder} has no config.json: name a Transformers model folder.")
    read_object(config)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} has no safetensors weights: convert or download them first.")
    index = folder / "model.safetensors.index.json"
    shards = set(read_object(index).get("weight_map", {}).values()) if index.is_file() else set()
    if absent := sorted(shards - {file.name for file in files}):
        raise InputError(f"{folder} lacks the shard {absent[0]}: download it.")
    for file in files:
        _check_safetensors(file)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError where it holds none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise InputError(f"{path} is not a JSON object: download the model again.")
    return document


def _check_safetensors(file: Path) -> None:
    """Opening reads the header and compares its offsets with the file's size, so truncation shows here."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):  # torch would reserve memory of the size of the file
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is truncated or damaged ({error}): download it again.") from None
