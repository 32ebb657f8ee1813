"""What MODEL stands for, found once: `find` looks at the name, and everything else takes what it found.

    name                       BF16 weights                      quantized weights
    a folder, or `demo`        the folder                        none
    a hub id                   the hub id                        none
    a quantized folder         what its mixquant.json names      the folder
    the hub id of such a one   what its mixquant.json names      its download

A checkpoint is quantized if its own files say so: `quantization_config` in config.json (or in its text_config), or a
ModelOpt hf_quant_config.json. Every way in which a name can be wrong is one sentence.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

from mixquant.checkpoint.quantized import QuantizedFolder, quantized_by
from mixquant.checkpoint.shards import read_headers
from mixquant.checkpoint.sidecar import SIDECAR, DecodeModel, Sidecar, find_sidecar
from mixquant.errors import InputError
from mixquant.policy import Policy

DEMO = Path(__file__).parents[1] / "demo" / "model"
"""The folder of the shipped model."""

READ = ("compressed-tensors", "modelopt")
"""How the methods begin whose weights can be read (`quantized`)."""

SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""File names of a model's configuration, tokenizer and chat template."""


@dataclass(frozen=True)
class Found:
    """MODEL, looked up once: its BF16 weights, and the quantized ones that belong to them, if there are any.

    name: as the user said it; sentences and cards call it so. decode: the BF16 model, a folder whose files were checked
    or a hub id. revision: of the hub id. quantized: the quantized weights of the same model. sidecar: the
    `mixquant.json` beside MODEL.
    """

    name: str
    decode: str
    revision: str | None = None
    quantized: QuantizedFolder | None = None
    sidecar: Sidecar | None = None

    @property
    def folder(self) -> Path | None:
        """The BF16 model's folder; None for a hub id."""
        path = Path(self.decode)
        return path if path.is_dir() else None

    @property
    def served(self) -> str:
        """What an engine is told to serve: MODEL's own folder, or its hub id."""
        return str(self.quantized.path) if self.quantized else self.decode

    def quantized_as(self, policy: Policy) -> QuantizedFolder | None:
        """MODEL's own quantized weights, where they are in the policy's format."""
        folder = self.quantized
        own = folder is not None and {policy.prefill, policy.decode} <= {*folder.formats, "bf16"}
        return folder if own else None

    def download(self) -> Path:
        """The BF16 model's folder, brought from the hub where it is not here yet."""
        return self.folder or fetch(self.decode, self.revision)

    def check(self) -> None:
        """Raise InputError where the BF16 model is not the one that the quantized weights were made from."""
        if self.quantized is not None and self.sidecar is not None and self.sidecar.decode_model is not None:
            self.sidecar.decode_model.check(self.download())


def find(name: str | Path, revision: str | None = None) -> Found:
    """Look MODEL up: a folder, a hub id (at `revision`), or `demo`.

    Raises InputError where it is none of them, where its files are incomplete or damaged, and for quantized weights
    without a `mixquant.json` that names their BF16 model.
    """
    name = str(name)
    located = locate(name)
    if not located.is_dir():
        return _find_on_hub(name, revision)
    headers, method = read_headers(located), quantized_by(located)
    sidecar = find_sidecar(located)
    if method is None:
        return Found(name, str(located), None, None, sidecar)
    if sidecar is None or sidecar.decode_model is None:
        raise already_quantized(name, method)
    return _with_decode_model(name, QuantizedFolder(located, headers), sidecar, sidecar.decode_model)


def _find_on_hub(name: str, revision: str | None) -> Found:
    config = _hub_file(name, "config.json", revision)
    if config is None:
        raise InputError(f"{name} has no config.json on the hub: name a model of Transformers.")
    _hub_file(name, "hf_quant_config.json", revision)
    sidecar = _hub_file(name, SIDECAR, revision)
    method = quantized_by(config.parent)
    if method is None:
        return Found(name, name, revision, None, find_sidecar(config.parent) if sidecar else None)
    return replace(find(fetch(name, revision)), name=name)


def _with_decode_model(name: str, quantized: QuantizedFolder, sidecar: Sidecar, named: DecodeModel) -> Found:
    decode = named.located(quantized.path)
    return Found(name, str(fetch(decode.model, decode.revision)), None, quantized, sidecar)


def already_quantized(name: str, method: str, remedy: str | None = None) -> InputError:
    """What quantized weights are refused with where the BF16 model is needed."""
    if remedy is None:
        remedy = "use the BF16 model"
        if method.startswith(READ):
            remedy += f", with prefill_weights={name!r} for these weights (no {SIDECAR} here names that model)"
    return InputError(f"{name} is already quantized by {method}: {remedy}.")


def locate(name: str) -> Path:
    """A model's folder, or the path that its hub id looks like. InputError for what can be neither."""
    folder = DEMO if name == "demo" else Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} has no config.json: name a Transformers model folder.")
        return folder
    if folder.suffix == ".gguf":
        raise InputError(f"{name} is a GGUF file, which mixquant does not read: name the original checkpoint's folder.")
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is not a folder: name a model folder, a hub id such as Qwen/Qwen3-0.6B, or demo.")
    if difflib.get_close_matches(name.lower(), ["demo"], cutoff=0.8):
        raise InputError(f"There is no folder {name}: did you mean demo?")
    return folder


def fetch(model: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, checked, or its weights and settings downloaded from the hub."""
    located = locate(model)
    if located.is_dir():
        read_headers(located)
        return located
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=[*SETTINGS, "*.safetensors"]))
    except Exception as error:
        raise _unreachable(model, error) from error


def _hub_file(model: str, file: str, revision: str | None) -> Path | None:
    """One file of a hub model, from the cache where there is no network; None where the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(model, file, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and file == "config.json":
            raise _unreachable(model, error) from error
        return None
    except Exception as error:
        raise _unreachable(model, error) from error


def _unreachable(model: str, error: Exception) -> InputError:
    return InputError(f"Cannot download {model} ({type(error).__name__}): check its name and the network.")
