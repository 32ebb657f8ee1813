"""`mixquant inspect`: what a quantized folder holds, from its headers alone.

A safetensors file begins with the names, dtypes and shapes of its tensors, so a folder of 100 GB is read in less than a
second. A layer here is what has a matrix named `weight`: linear layers, and embeddings, which headers cannot tell from
them. Layers that were left in 16 bits are listed as `ignored`; norms and biases count only in the whole's `bytes`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixquant.checkpoint.locate import locate
from mixquant.checkpoint.quantized import QuantizedFolder, quantization_config
from mixquant.checkpoint.sidecar import find_sidecar
from mixquant.devices import size_text
from mixquant.errors import InputError

HEAD = ("layers", "n", "format", "shape", "size", "bits")


def inspect(folder: str | Path) -> dict[str, Any]:
    """The document that `mixquant inspect --json` prints; InputError where `folder` holds no quantized layer.

    Keys: format, tool (who wrote it), layers.{name}.{format, shape [N, K], bytes}, ignored, policy, recipe and
    decode_model (of `mixquant.json`, else null), bytes.
    """
    path = locate(str(folder))
    if not path.is_dir():
        raise InputError(f"{folder} is not a folder: download the model, and name its folder.")
    quantized, sidecar = QuantizedFolder(path), find_sidecar(path)
    headers = {name: quantized.describe(name) for name in quantized.layers()}
    layers = {name: asdict(header) for name, header in headers.items() if len(header.shape) == 2}
    named = sidecar.to_dict() if sidecar else {}
    return {
        "format": "+".join(sorted(quantized.formats)),
        "tool": quantization_config(path).get("quant_method"),
        "layers": layers,
        "ignored": [name for name, layer in layers.items() if layer["format"] == "bf16"],
        "policy": named.get("policy"),
        "recipe": named.get("recipe"),
        "decode_model": named.get("decode_model"),
        "bytes": quantized.bytes,
    }


def show(report: dict[str, Any]) -> None:
    """Print the document as a table with a row for each kind of layer.

    Names are never broken, however narrow the terminal is: they are what people copy, and what `grep` looks for.
    """
    lines = [f"{report['format']} by {report['tool']}, {size_text(report['bytes'])}", ""]
    lines += _table([HEAD, *_rows(report["layers"])])
    lines += ["", f"recipe: {_words(report['recipe'] or {}) or 'not named'}"]
    lines += [f"BF16 model: {(report['decode_model'] or {}).get('model', 'not named')}"]
    print("\n".join(lines))


def _rows(layers: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for (kind, format, shape), sizes in _kinds(layers).items():
        weights = len(sizes) * shape[0] * shape[1]
        bits = f"{8 * sum(sizes) / weights:.2f}"
        yield kind, str(len(sizes)), format, f"{shape[0]} x {shape[1]}", size_text(sum(sizes)), bits


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with their columns under one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _kinds(layers: dict[str, dict[str, Any]]) -> dict[tuple[str, str, tuple[int, int]], list[int]]:
    """Sizes of the layers that differ only by the numbers in their names."""
    kinds = defaultdict(list)
    for name, layer in layers.items():
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        kinds[kind, layer["format"], tuple(layer["shape"])].append(layer["bytes"])
    return kinds


def _words(recipe: dict[str, Any]) -> str:
    """The plain values of a recipe; what is switched off or has parts of its own is left to the JSON document."""
    plain = {name: value for name, value in recipe.items() if isinstance(value, str | int | float) and value}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in plain.items())
