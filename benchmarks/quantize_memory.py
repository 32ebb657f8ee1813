"""What `mixquant.quantize` takes: the peak of anonymous memory, with ten times the layers, and with a wide layer.

    python benchmarks/quantize_memory.py     # prints the table that benchmarks/results/ keeps

Qwen3-shaped models of random parameters are saved once, then quantized in a fresh process each. Anonymous memory
leaves out the checkpoint's own pages, which the kernel maps and may drop at will. `bound` is what the design allows:
one decoder layer in float32, the hidden states of the calibration text, and with GPTQ the mean of x x^T for each input
of one layer and one more matrix as large as the largest of these; temporaries of at most 40 MiB and one sequence's
activations come on top. What the process holds before (interpreter, torch, Transformers) is not counted.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.own_memory import in_fresh_process, watched

TOKENS = 8_192
SHAPES = {"2": (2, 512, 1536), "20": (20, 512, 1536), "1 wide": (1, 1024, 4608)}
"""(layers, hidden size, intermediate size)"""
RECIPES = {
    "streamed, no calibration": {"calibration": None},
    "search": {"gptq": False},
    "fold, search, gptq": {"fold": True, "gptq": True},
}


def main() -> None:
    if len(sys.argv) > 1:
        print(quantize_here(sys.argv[1], sys.argv[2]))
        return
    from transformers import Qwen3Config, Qwen3ForCausalLM

    print(f"torch {torch.__version__}, CPU; MiB of anonymous memory at the peak, beyond what the process held before")
    print(f"{'recipe':<26}{'layers':>8}{'model':>9}{'peak':>9}{'bound':>9}")
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "text.txt")
        for shape, (layers, hidden, intermediate) in SHAPES.items():
            config = Qwen3Config(
                vocab_size=512, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
                num_attention_heads=hidden // 64, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
            )  # fmt: skip
            save(Qwen3ForCausalLM(config).to(torch.bfloat16), Path(folder) / shape)
        for name, options in RECIPES.items():
            for shape in SHAPES:
                path = Path(folder) / shape
                size = (path / "model.safetensors").stat().st_size
                peak = int(in_fresh_process(__file__, path, name))
                print(f"{name:<26}{shape:>8}{mib(size)}{mib(peak)}{mib(bound(shape, options))}", flush=True)


def bound(shape: str, options: dict[str, object]) -> int:
    """Bytes that the design allows."""
    _, hidden, intermediate = SHAPES[shape]
    layer = 4 * (3 * hidden * intermediate + (2 * hidden + 2 * 4 * 64) * hidden)
    hidden_states = 0 if "calibration" in options else TOKENS * hidden * 2
    means = [4 * k * k for k in (hidden, hidden, hidden, intermediate)] if options.get("gptq") else [0]
    return layer + hidden_states + sum(means) + max(means)


def quantize_here(model: str, recipe: str) -> int:
    """Bytes at the peak, beyond what a run on a small text left behind."""
    import mixquant

    torch.set_num_threads(1)
    output = Path(model).parent / "quantized"
    text = Path(model).parent / "text.txt"
    options = {"calibration": text, "overwrite": True} | RECIPES[recipe]
    mixquant.quantize("demo", "nvfp4", output=output, **options)  # what is built once: imports, fused loops
    with watched() as taken:
        mixquant.quantize(model, "nvfp4", output=output, **options)
    return taken.peak


def write_text(path: Path) -> None:
    """Enough for TOKENS tokens of the shipped tokenizer, which takes digits one by one."""
    digits = torch.randint(0, 10, (TOKENS - 1,), generator=torch.Generator().manual_seed(0)).tolist()
    path.write_text("".join(map(str, digits)))


def save(model: torch.nn.Module, folder: Path) -> None:
    from mixquant.checkpoint.locate import DEMO

    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)


def mib(size: int) -> str:
    return f"{size / 2**20:>9.1f}"


if __name__ == "__main__":
    main()
