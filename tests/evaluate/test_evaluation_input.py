"""`mixquant eval` with bad input: one sentence that names the remedy, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mixquant.checkpoint.locate import DEMO
from mixquant.commands.evaluate import Settings, check_output, parse_seeds
from mixquant.errors import InputError
from mixquant.integrations.transformers import loading
from tests.commandline import call, refuse


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["bf16", "phse"]}, "did you mean phase"),
        ({"prefill": "fp4"}, "nvfp4"),
        ({"engine": "vlm"}, "did you mean vllm"),
        ({"arms": ["phase"]}, "add bf16 to the arms"),
        ({"tasks": []}, "No task is named"),
        ({"arms": ["bf16", "bf16", "phase"]}, "An arm is named twice: name each arm once"),
        ({"seeds": [1, 1]}, "named twice"),
        ({"seeds": []}, "there is none"),
        ({"seeds": [3, -1]}, "seed -1 is negative: data seeds are 0 or more"),
        ({"seeds": [2**53 + 1]}, "seed 9007199254740993 is above 9007199254740992"),
        ({"device": "tpu"}, "Unknown device 'tpu': use cpu or cuda"),
        ({"servers": {"bf16": "http://localhost:1/v1"}, "arms": ["bf16", "phase"]}, "name a server for every arm"),
        ({"served_model_name": "m"}, "add --server ARM=URL for each arm"),
        ({"layers": True, "engine": "vllm"}, "leave out --layers"),
        ({"layers": True, "tail": 4}, "leave out --tail"),
        (
            {"servers": {"bf16": "http://localhost:1/v1", "phase": "http://localhost:2/v1"}, "tail": 4},
            "leave out --tail",
        ),
        (
            {
                "arms": ["bf16"],
                "questions": ["mine=fp8"],
                "servers": {"bf16": "http://localhost:1/v1", "mine": "http://localhost:2/v1"},
            },
            "Unknown arm 'mine'",
        ),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, object], message: str) -> None:
    chosen = {"model": "demo", "arms": ["bf16", "phase"], "tasks": ["agent"]}
    with pytest.raises(InputError, match=message):
        Settings(**chosen | change)  # type: ignore[arg-type]


def test_seeds_are_counted_or_listed() -> None:
    assert parse_seeds("3") == [100, 101, 102]
    assert parse_seeds("64") == list(range(100, 164))
    assert parse_seeds("11,13") == [11, 13]
    assert parse_seeds("1234,") == [1234]


@pytest.mark.parametrize("text", ["0", "65", "1234", "1000000000", "-1", "x", "1,,2", "", ",", "1,-2", "1.5"])
def test_what_names_no_seeds_is_told_the_bound(text: str) -> None:
    with pytest.raises(InputError, match=r"names no data seeds: give their number, 1 to 64, or list them with commas"):
        parse_seeds(text)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"name the output results\.json"):
        check_output(tmp_path / "results.html", [])
    for name in (".", "..", "/"):
        with pytest.raises(InputError, match=r"name the output results\.json"):
            check_output(Path(name), [])
    with pytest.raises(InputError, match="not a folder"):
        check_output(tmp_path / "none" / "results.json", [])
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        check_output(tmp_path / "folder.json", [])


def test_a_task_file_is_never_the_journal(tmp_path: Path) -> None:
    """`own.jsonl` is what `-o own.json` would append its answers to."""
    own, link, content = tmp_path / "own.jsonl", tmp_path / "link.jsonl", '{"prompt": "a"}\n{"prompt": "b'
    own.write_text(content)
    link.hardlink_to(own)
    for task, output in ((own, "own.json"), (tmp_path / "x" / ".." / "own.jsonl", "own.json"), (own, "link.json")):
        with pytest.raises(InputError, match=r"is where the answers of .* would go: name another output\.$"):
            check_output(tmp_path / output, ["agent", str(task)])
    with pytest.raises(InputError, match=r"own\.jsonl, where the answers would go, is no journal"):
        check_output(tmp_path / "own.json", ["agent"])
    assert own.read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "agnt"], "did you mean agent"),
        (["--arms", "phase"], "add bf16 to the arms"),
        (["--arms", "bf16,bf16,phase"], "An arm is named twice"),
        (["--seeds", "many"], "data seeds"),
        (["--seeds", "-3"], "data seeds"),
        (["--limit", "1000000000"], "3,000,000,000 examples of each rung are more than 10,000"),
        (["--arms", "bf16,phase-control"], "phase-control repeats the arm phase: add that to the arms."),
        (["--arm", "tail64"], "'tail64' is no arm: write NAME=POLICY, such as tail64=nvfp4,tail=64."),
        (["--arm", "mine=nvfp4,tial=64"], "The arm mine: "),
        (["--device", "tpu"], "Unknown device"),
        (["--server", "phase=nowhere"], "ARM=URL"),
    ],
)
def test_the_command_exits_with_2_and_one_sentence(options: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    done = call("eval", "demo", "-o", output, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tasks", ["agent", "mine.jsonl"])
def test_a_model_without_chat_template_is_told_before_its_weights_load(
    tasks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (tmp_path / "mine.jsonl").write_text(f"{json.dumps(CHAT)}\n")
    (tmp_path / "text.jsonl").write_text(f"{json.dumps(CHAT | {'prompt': 'hello'})}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded())
    sentence = "mixquant: The model has no chat template: give plain text, or a tokenizer with a template.\n"
    assert refuse("eval", model, "-o", "results.json", "--limit", "1", "--tasks", tasks) == sentence
    with pytest.raises(Loaded):  # control: a text needs no template, and goes on to the weights
        call("eval", model, "-o", "results.json", "--limit", "1", "--tasks", "text.jsonl")


CHAT = {"prompt": [{"role": "user", "content": "hello"}], "answer": "x", "checker": "exact"}


class Loaded(BaseException):
    """Weights were about to load."""


def loaded() -> None:
    raise Loaded
