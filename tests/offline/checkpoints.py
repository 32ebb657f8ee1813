"""Small BF16 checkpoints for the offline quantizer: channels of very different sizes, and a real tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from mixquant.checkpoint.locate import DEMO
from tests.conftest import tiny_qwen3

SIZES = {"vocab_size": 512, "tie_word_embeddings": True, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}


def outlier_model(**changes: object) -> PreTrainedModel:
    """A tiny Qwen3 in BF16 with some channels sixteen times larger than others: folding then has work to do."""
    model = tiny_qwen3(torch.bfloat16, **SIZES | changes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("layernorm.weight", "v_proj.weight", "up_proj.weight")):
            sizes = torch.randint(-2, 3, parameter.shape[:1], generator=generator).exp2()
            parameter.data.mul_(sizes.view(-1, *[1] * (parameter.ndim - 1)))
    return model


def save(model: PreTrainedModel, folder: Path, shard: str = "5GB") -> Path:
    """A complete checkpoint, with the shipped model's tokenizer."""
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / name, folder / name)
    return folder


def chats(path: Path, count: int = 6) -> Path:
    """A JSONL file of short chats."""
    talks = [
        [{"role": "user", "content": f"Add {n} and {7 * n % 11}."}, {"role": "assistant", "content": str(n)}]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    return path


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint in shards."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
