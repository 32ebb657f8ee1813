"""The command line from outside: JSON on stdout, one sentence and exit code 2 for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixquant.checkpoint.locate import DEMO, find
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.prompts import encode, read_prompt

MIXQUANT = [sys.executable, "-c", "from mixquant.cli import main; main()"]


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MIXQUANT, *map(str, args)], capture_output=True, text=True, timeout=300)


def refuse(*args: str | Path) -> str:
    """Run a command that must fail cleanly; its one sentence."""
    result = run(*args)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("mixquant: ")
    return result.stderr


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    return folder


def edit_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_help_answers_at_once() -> None:
    run("--help")  # warms the file cache
    start = time.perf_counter()
    assert run("--help").returncode == 0
    assert time.perf_counter() - start < 0.5  # 0.3 s is the aim; a busy machine gets some slack


def test_doctor_json_names_every_kernel() -> None:
    report = json.loads(run("doctor", "demo", "--json", "--device", "cpu").stdout)
    assert set(report["formats"]) >= {"nvfp4", "fp8", "int8"}
    for status in report["formats"].values():
        assert status["status"] in ("native", "emulated", "unavailable")
        assert status["kernel"]
    assert report["formats"]["nvfp4"]["status"] == "emulated"
    assert "CUDA" in report["formats"]["nvfp4"]["reason"]
    bill = report["memory"]
    assert bill["total_bytes"] == bill["decode_bytes"] + bill["prefill_bytes"]
    assert bill["fits"] is True


@pytest.mark.parametrize("prefill", ["nvfp4", "int8", "bf16"])
def test_generate_json_says_what_ran(prompt: Path, prefill: str) -> None:
    result = run("generate", "demo", "--prompt-file", prompt, "--prefill", prefill, "--max-new-tokens", "4", "--json")
    answer = json.loads(result.stdout)
    assert answer["policy"] == {"prefill": prefill, "decode": "bf16", "tail": 1}
    assert 1 <= len(answer["token_ids"]) <= 4
    assert all(prefill in name for name in answer["kernels"]["prefill"]) or prefill == "bf16"
    assert answer["emulated"] == any(name.startswith("emulation") for name in answer["kernels"]["prefill"])
    assert (answer["prefill_ms"] is None) == answer["emulated"]


def test_generate_streams_text_and_keeps_the_rest_on_stderr(prompt: Path) -> None:
    result = run("generate", "demo", "--prompt-file", prompt, "--prefill", "int8", "--max-new-tokens", "4")
    assert result.returncode == 0
    assert "prompt tokens" in result.stderr
    assert "prompt tokens" not in result.stdout


def test_unknown_format_names_the_nearest(prompt: Path) -> None:
    assert "did you mean nvfp4?" in refuse("generate", "demo", "--prompt-file", prompt, "--prefill", "nvfp")


def test_prompt_errors(tmp_path: Path) -> None:
    empty, binary, long = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "long.txt"
    empty.write_text("")
    binary.write_bytes(b"\xff\xfe\x00bad")
    long.write_text("word " * 20000)
    assert "empty" in refuse("generate", "demo", "--prompt-file", empty)
    assert "UTF-8" in refuse("generate", "demo", "--prompt-file", binary)
    assert "context window" in refuse("generate", "demo", "--prompt-file", long)
    assert "No such file" in refuse("generate", "demo", "--prompt-file", tmp_path / "none.txt")
    assert "Is a directory" in refuse("generate", "demo", "--prompt-file", tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{]", "not valid JSON"),
        ('{"a": 1}', "holds no chat"),
        ("[]", "holds no chat"),
    ],
)
def test_chat_errors(tmp_path: Path, content: str, complaint: str) -> None:
    """In process: starting Python for each would take seconds."""
    path = tmp_path / "chat.json"
    path.write_text(content)
    with pytest.raises(InputError, match=complaint):
        encode(load_tokenizer(find("demo")), read_prompt(path))


def test_model_folder_errors(tmp_path: Path, prompt: Path, model: Path) -> None:
    def complaint() -> str:
        return refuse("generate", model, "--prompt-file", prompt, "--prefill", "nvfp4")

    assert "is not a folder" in refuse("generate", tmp_path / "none", "--prompt-file", prompt)
    weights = model / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "truncated" in complaint()
    weights.unlink()
    assert "no safetensors" in complaint()
    (model / "config.json").unlink()
    assert "no config.json" in complaint()


def test_damaged_folders(model: Path) -> None:
    """In process, each damage on top of the last."""

    def complaint(what: Callable[[str], object]) -> str:
        with pytest.raises(InputError) as caught:
            what(str(model))
        return str(caught.value)

    def load(name: str) -> object:
        return load_model(find(name), "nvfp4", torch.device("cpu"))

    tensors = load_file(model / "model.safetensors")
    norm = tensors.pop("model.layers.1.input_layernorm.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "lacks model.layers.1.input_layernorm.weight" in complaint(load)
    tensors["model.layers.1.input_layernorm.weight"] = norm * torch.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.input_layernorm.weight holds" in complaint(load)
    edit_config(model, intermediate_size=1280)
    assert "has shape [384, 640] and config.json says [384, 1280]" in complaint(load)
    edit_config(model, vocab_size=7, intermediate_size=640)
    assert "has shape [512, 384]" in complaint(load)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-2.safetensors"}}')
    assert "lacks the shard model-2.safetensors" in complaint(load)
    (model / "model.safetensors.index.json").unlink()
    for broken in ({"hidden_size": "x"}, {"num_attention_heads": 0}):
        edit_config(model, **broken)
        assert "Cannot read" in complaint(load)
    for file in model.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in complaint(load_tokenizer)
    (model / "config.json").write_text("[]")
    assert "not a JSON object" in complaint(load)


def test_unsupported_architectures(prompt: Path, model: Path) -> None:
    edit_config(model, model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert "not a causal language model" in refuse("generate", model, "--prompt-file", prompt)
    edit_config(model, model_type="nonesuch")
    assert "Cannot read" in refuse("generate", model, "--prompt-file", prompt)


def test_code_that_a_checkpoint_brings_is_never_run(prompt: Path, model: Path, tmp_path: Path) -> None:
    """Nor is anybody asked, on a terminal or off it: the file would leave its mark."""
    mark = tmp_path / "it ran"
    (model / "modeling_own.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass OwnConfig: pass\nclass Own: pass\n"
    )
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    edit_config(model, model_type="own", architectures=["Own"], auto_map=names)
    assert "brings Python code of its own, which mixquant never runs" in refuse(
        "generate", model, "--prompt-file", prompt
    )
    assert not mark.exists()


def test_already_quantized_checkpoints(prompt: Path, model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "compressed-tensors"})
    assert "already quantized by compressed-tensors" in refuse("generate", model, "--prompt-file", prompt)


def test_nan_weights_name_their_tensor(prompt: Path, model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert name.removesuffix(".weight") in refuse("generate", model, "--prompt-file", prompt, "--prefill", "nvfp4")


def test_memory_that_does_not_suffice_is_said_before_loading(prompt: Path, model: Path) -> None:
    edit_config(model, intermediate_size=100_000_000)
    assert "GiB free" in refuse("generate", model, "--prompt-file", prompt, "--prefill", "nvfp4")


def test_a_native_kernel_that_is_not_there_is_an_error(prompt: Path) -> None:
    args = ("--prompt-file", prompt, "--device", "cpu", "--prefill", "nvfp4", "--native")
    assert "runs on CUDA, not on cpu" in refuse("generate", "demo", *args)


def test_a_missing_device_is_named() -> None:
    if not torch.cuda.is_available():
        assert "no CUDA device" in refuse("doctor", "--device", "cuda")
    assert "Unknown device" in refuse("doctor", "--device", "quantum")
    assert "Unknown device" in refuse("doctor", "--device", "meta")
