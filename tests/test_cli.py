"""The command line from outside: JSON on stdout, one sentence and exit code 2 for bad input."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mixquant
from mixquant.checkpoint.locate import DEMO, find
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.kernels.proof import BLACKWELL
from mixquant.prompts import encode, read_prompt
from tests.commandline import MIXQUANT, call, refuse, run

CHAT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(CHAT, encoding="utf-8")
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


HEAVY = {"accelerate", "lm_eval", "numpy", "torch", "transformers", "vllm"}


def run_and_tell(*arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A command in a process of its own, and which heavy libraries it imported."""
    code = f"import sys, mixquant.cli\ntry: mixquant.cli.main()\nfinally: print(sorted({HEAVY} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    return result, result.stdout.splitlines()[-1]


def test_help_imports_nothing_heavy() -> None:
    """Which is what makes it quick."""
    result, imported = run_and_tell("--help")
    assert (result.returncode, imported) == (0, "[]")


def test_control_a_command_imports_torch_and_bad_input_ends_its_process() -> None:
    """From outside once; `refuse` says it of all others in this process."""
    result, imported = run_and_tell("inspect", "nowhere")
    assert "'torch'" in imported
    assert result.returncode == 2
    assert result.stderr == "mixquant: nowhere is not a folder: download the model, and name its folder.\n"


def test_the_version_is_the_packages() -> None:
    assert run("--version").stdout == call("--version").stdout == f"mixquant {mixquant.__version__}\n"


def test_shells_complete_commands() -> None:
    asked = {"_MIXQUANT_COMPLETE": "complete_bash", "COMP_WORDS": "mixquant ge", "COMP_CWORD": "1"}
    result = subprocess.run(MIXQUANT, env=os.environ | asked, capture_output=True, text=True)
    assert result.stdout.split() == ["generate"]


def test_a_full_disk_behind_stdout_is_one_sentence() -> None:
    """Outputs as small as these are written only when the process ends."""
    for command in ("--help", "--version"):
        with Path("/dev/full").open("w") as full:
            result = subprocess.run([*MIXQUANT, command], stdout=full, stderr=subprocess.PIPE, text=True)
        assert result.returncode == 2
        assert result.stderr == (
            "mixquant: The output cannot be written (No space left on device): send it to another place.\n"
        )


@pytest.mark.parametrize(
    "arguments", [["--version"], ["eval", "--help"], pytest.param(["doctor"], marks=pytest.mark.slow)]
)
def test_a_reader_that_has_read_enough_is_no_error(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}  # each print fails by itself, as a long output's do
    for environment in (os.environ, unbuffered):
        result = subprocess.run(
            [*MIXQUANT, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert (result.returncode, result.stderr) == (0, "")
    os.close(writer)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("mixquant.errors.InputError('It is wrong: mend it.')", 2, "mixquant: It is wrong: mend it.\n"),
        ("SystemExit(3)", 3, ""),
    ],
)
def test_what_goes_wrong_after_the_reader_has_left_still_counts(raised: str, code: int, said: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = _failing(f"print('a line that stays in the buffer'); raise {raised}", writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (code, said)


def test_a_broken_pipe_of_a_commands_own_is_an_error() -> None:
    assert _failing("raise BrokenPipeError(32, 'Broken pipe')", subprocess.PIPE).returncode == 1


def _failing(does: str, stdout: int) -> subprocess.CompletedProcess[str]:
    """A process whose command `doctor` does this."""
    code = (
        "import sys, mixquant.errors\nfrom mixquant import cli\n"
        f"def does(*_, **__):\n    {does}\n"
        "import mixquant.commands.doctor as doctor\ndoctor.examine = does\ncli.main(['doctor'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_doctor_json_names_every_kernel() -> None:
    report = json.loads(call("doctor", "demo", "--json", "--device", "cpu").stdout)
    assert set(report["formats"]) >= {"nvfp4", "fp8", "int8"}
    for status in report["formats"].values():
        assert status["status"] in ("native", "emulated", "unavailable")
        assert status["kernel"]
    assert report["formats"]["nvfp4"]["status"] == "emulated"
    assert "CUDA" in report["formats"]["nvfp4"]["reason"]
    assert report["nested"]["kernel"] == "emulation.nested"
    assert report["formats"]["nvfp4"]["candidates"][-1]["proven"] == "ran"
    assert report["proven"]["torch.scaled_mm.nvfp4"] == {"CPU": "emulated"} | dict.fromkeys(BLACKWELL, "never")
    bill = report["memory"]
    assert bill["total_bytes"] == bill["decode_bytes"] + bill["prefill_bytes"]
    assert bill["total_bytes"] == bill["own_bytes"] + bill["mapped_bytes"]
    assert 0 < bill["mapped_bytes"] < bill["original_bytes"]  # its files are BF16: what is not packed stays mapped
    assert bill["fits"] is True


def test_doctor_bills_nested_weights() -> None:
    options = ("--prefill", "fp8", "--json", "--device", "cpu")
    separate, nested = (
        json.loads(call("doctor", "demo", *options, "--storage", storage).stdout) for storage in ("separate", "nested")
    )
    assert nested["policy"] == {"prefill": "fp8", "decode": "bf16", "storage": "nested"}
    assert nested["memory"]["nested_layers"] == nested["memory"]["layers"] > 0
    assert separate["memory"]["nested_layers"] == 0
    assert nested["memory"]["overhead_ratio"] < 1 < separate["memory"]["overhead_ratio"]


@pytest.mark.parametrize(("prefill", "tail"), [("nvfp4", 1), ("int8", 3), ("bf16", 0)])
def test_generate_json_says_what_ran(prompt: Path, prefill: str, tail: int) -> None:
    options = ("--prefill", prefill, "--tail", str(tail), "--max-new-tokens", "4", "--json")
    answer = json.loads(call("generate", "demo", "--prompt-file", prompt, *options).stdout)
    assert answer["policy"] == {"prefill": prefill, "decode": "bf16", "tail": tail}
    assert 1 <= len(answer["token_ids"]) <= 4
    assert all(prefill in name for name in answer["kernels"]["prefill"]) or prefill == "bf16"
    assert answer["emulated"] == any(name.startswith("emulation") for name in answer["kernels"]["prefill"])
    assert (answer["prefill_ms"] is None) == answer["emulated"]


@pytest.mark.slow
def test_generate_streams_text_and_keeps_the_rest_on_stderr(prompt: Path) -> None:
    result = run("generate", "demo", "--prompt-file", prompt, "--prefill", "int8", "--max-new-tokens", "4")
    assert result.returncode == 0
    assert "prompt tokens" in result.stderr
    assert "prompt tokens" not in result.stdout


def test_a_prompt_is_a_file_stdin_or_an_argument(prompt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*given: str | Path) -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(CHAT.encode())))
        return call("generate", "demo", *given, "--prefill", "bf16", "--max-new-tokens", "8", "--json").stdout

    def said(*given: str | Path) -> list[int]:
        ids: list[int] = json.loads(answer(*given))["token_ids"]
        return ids

    assert said("--prompt-file", prompt) == said("--prompt-file", "-") == said("--prompt", CHAT)
    assert said("--prompt", CHAT) != said("--prompt", "12 + 3 =")


def test_prompts_that_are_none_or_two(prompt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "either as --prompt TEXT or as --prompt-file FILE" in refuse("generate", "demo")
    assert "either as --prompt TEXT" in refuse("generate", "demo", "--prompt", "x", "--prompt-file", prompt)
    assert "The prompt is empty" in refuse("generate", "demo", "--prompt", "", "--prefill", "bf16")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert "stdin is not UTF-8 text" in refuse("generate", "demo", "--prompt-file", "-")


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
    half = tmp_path / "half.json"
    half.write_text(json.dumps([{"role": "user", "content": "a\ud800"}]))
    assert "half a character" in refuse("generate", "demo", "--prompt-file", half)
    assert "half a character" in refuse("generate", "demo", "--prompt", os.fsdecode(b"a\xff"))


@pytest.mark.parametrize(
    ("content", "complaint"), [("{]", "not valid JSON"), ('{"a": 1}', "holds no chat"), ("[]", "holds no chat")]
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
        return load_model(find(name), "fp8", torch.device("cpu"))  # the quickest to quantize

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
    assert "no tokenizer" in complaint(lambda name: load_tokenizer(find(name)))
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
