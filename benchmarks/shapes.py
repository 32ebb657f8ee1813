"""Writes a folder with the shape of a well-known model: without weights, for `--load-format dummy`, or random ones.

    python -m benchmarks.shapes 8b FOLDER [--weights]

`8b` is Qwen3-8B, and `8b-12` its first 12 layers; `30b-a3b` Qwen3-30B-A3B, `30b-a3b-8` and `-24` its first layers, all
but for a context of 128K tokens; `glm-air-4` the first 4 layers of GLM-4.5-Air, one dense and three with 128 routed
experts and a shared one; `tiny` is for trying out on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"

DENSE = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}
EXPERTS = DENSE | {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128,
    "num_experts_per_tok": 8, "num_attention_heads": 32, "num_key_value_heads": 4, "norm_topk_prob": True,
}  # fmt: skip
GLM_AIR = DENSE | {
    "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8, "num_attention_heads": 96,
    "first_k_dense_replace": 1, "attention_bias": True, "norm_topk_prob": True,
}  # fmt: skip
QWEN3_8B = DENSE | {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": QWEN3_8B | {"num_hidden_layers": 36},
    "8b-12": QWEN3_8B | {"num_hidden_layers": 12},
    "30b-a3b": EXPERTS | {"num_hidden_layers": 48},
    "30b-a3b-24": EXPERTS | {"num_hidden_layers": 24},
    "30b-a3b-8": EXPERTS | {"num_hidden_layers": 8},
    "glm-air-4": GLM_AIR | {"num_hidden_layers": 4},
    "tiny": DENSE
    | {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", action="store_true")
    args = parser.parse_args()
    write(args.shape, args.folder, args.weights)


def config(name: str) -> Any:
    """The configuration of a shape."""
    from transformers import Glm4MoeConfig, Qwen3Config, Qwen3MoeConfig

    sizes = SHAPES[name]
    if "n_routed_experts" in sizes:
        make, architecture = Glm4MoeConfig, "Glm4MoeForCausalLM"
    elif "num_experts" in sizes:
        make, architecture = Qwen3MoeConfig, "Qwen3MoeForCausalLM"
    else:
        make, architecture = Qwen3Config, "Qwen3ForCausalLM"
    return make(**sizes, dtype="bfloat16", architectures=[architecture])


def write(name: str, folder: Path, weights: bool = False) -> None:
    """weights: random, and the same each time; matrices of deviation 0.02, norms of 1."""
    config(name).save_pretrained(folder)
    if not weights:
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # what stands for the weights
    elif not (folder / INDEX).exists():
        write_weights(name, folder)


def write_weights(name: str, folder: Path) -> None:
    """Seeded random weights, in shards of one decoder layer."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config(name)).state_dict()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shards: dict[str, dict[str, Tensor]] = {}
    for key, meta in state.items():
        shard = key.split(".")[2] if ".layers." in key else key.split(".")[-2]
        make = torch.randn if meta.ndim > 1 else torch.ones
        value = make(meta.shape, device=device, dtype=torch.bfloat16) * (0.02 if meta.ndim > 1 else 1)
        shards.setdefault(f"model-{shard}.safetensors", {})[key] = value.cpu()
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {key: file for file, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


if __name__ == "__main__":
    main()
