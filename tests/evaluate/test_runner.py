"""The runner and its journal: the same seed, the same file; nothing lost and nothing run twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixquant import kernels
from mixquant.checkpoint.locate import find
from mixquant.commands import evaluate as evaluation
from mixquant.errors import InputError
from mixquant.evaluate import suites
from mixquant.evaluate.items import Item, Place, measure
from mixquant.evaluate.logits import SavedLogits
from mixquant.evaluate.records import Journal, Record
from mixquant.evaluate.runner import Runner, batches, divergence, until
from mixquant.evaluate.suites import Amount, Capacity
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.kernels.nested import EmulatedNested
from mixquant.model.linear import PhaseLinear
from tests.commandline import MIXQUANT

pytestmark = pytest.mark.slow

ARMS = ["bf16", "bf16-control", "uniform", "phase"]
WINDOW = 3072
CPU = torch.device("cpu")
PRECISE = kernels.select("bf16", CPU, torch.bfloat16).name
"""What BF16 runs on here: it depends on the CPU's instructions."""


@pytest.fixture(scope="module")
def backend() -> TransformersBackend:
    return TransformersBackend.load(find("demo"), "nvfp4", torch.device("cpu"))


def test_where_weights_nest_by_default_fp8_is_the_plane_and_nvfp4_is_beside_the_librarys_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    separate = codes(load_model(find("demo"), "fp8", CPU))
    monkeypatch.setattr(EmulatedNested, "default_on", classmethod(lambda cls, device: True))
    served = load_model(find("demo"), "fp8", CPU)
    assert TransformersBackend(served).open("bf16").kernels["decode"] == [EmulatedNested.name]
    assert TransformersBackend(load_model(find("demo"), "nvfp4", CPU)).open("bf16").kernels["decode"] != [PRECISE]
    evaluated = codes(TransformersBackend.load(find("demo"), "fp8", CPU).model)
    assert all(map(torch.equal, codes(served), evaluated))
    assert not any(map(torch.equal, separate, evaluated))  # the control
    assert TransformersBackend.load(find("demo"), "nvfp4", CPU).open("bf16").kernels["decode"] == [PRECISE]


def codes(model: torch.nn.Module) -> list[torch.Tensor]:
    """What FP8 prompts are multiplied by, layer by layer."""
    layers = [module for module in model.modules() if isinstance(module, PhaseLinear)]
    return [next(iter(layer.prefill.tensors())).to(torch.float32) for layer in layers]


def settings(**changes: Any) -> evaluation.Settings:
    """Six short examples in four arms."""
    chosen = {"model": "demo", "arms": ARMS, "tasks": ["arithmetic"], "seeds": [100, 101], "limit": 3}
    return evaluation.Settings(**chosen | {"max_prompt_tokens": 500, "batch_size": 4} | changes)


def load(tasks: list[str], limit: int, tokenizer: Any, cap: int) -> list[Item]:
    return suites.load(tasks, {}, Amount([100], limit), Capacity(tokenizer, WINDOW, cap)).items


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run."""
    output = tmp_path_factory.mktemp("run") / "results.json"
    evaluation.evaluate(settings(), output, "command")
    return output


def without_times(path: Path) -> str:
    document = json.loads(path.read_text())
    del document["time"]
    return json.dumps(document)


def test_the_same_seed_gives_the_same_file(results: Path, tmp_path: Path) -> None:
    evaluation.evaluate(settings(), tmp_path / "again.json", "command")
    assert without_times(tmp_path / "again.json") == without_times(results)
    assert (tmp_path / "again.jsonl").read_text() == results.with_suffix(".jsonl").read_text()


def test_another_seed_gives_another_file(results: Path, tmp_path: Path) -> None:
    evaluation.evaluate(settings(seeds=[100, 102]), tmp_path / "other.json", "command")
    assert without_times(tmp_path / "other.json") != without_times(results)


def test_the_document_holds_what_was_asked_for(results: Path) -> None:
    document = json.loads(results.read_text())
    assert list(document["arms"]) == ARMS
    assert document["arms"]["phase"]["all"]["n"] == 6
    assert document["arms"]["phase"]["kernels"] == {"prefill": ["emulation.nvfp4"], "decode": [PRECISE]}
    assert document["arms"]["phase"]["emulated"] is True
    divergence = {arm: document["arms"][arm]["divergence"] for arm in ARMS}
    assert divergence["bf16"] is None
    assert divergence["bf16-control"]["kld_mean"] < divergence["phase"]["kld_mean"] < divergence["uniform"]["kld_mean"]


def test_a_finished_run_runs_nothing_again(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = results.with_suffix(".jsonl").read_bytes(), without_times(results)
    monkeypatch.setattr(TransformersBackend, "open", lambda *_: pytest.fail("an arm was opened again"))
    evaluation.evaluate(settings(), results, "command")
    assert (results.with_suffix(".jsonl").read_bytes(), without_times(results)) == before


@pytest.mark.parametrize(
    "change", [{"limit": 4}, {"seeds": [100, 102]}, {"tasks": ["lookup"]}, {"prefill": "int8"}, {"tail": 4}]
)
def test_a_journal_of_another_run_is_refused(results: Path, change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="belongs to another run"):
        evaluation.evaluate(settings(**change), results, "command")


@pytest.mark.parametrize("kept", [0.15, 0.4, 0.55, 0.9])
def test_a_cut_journal_resumes_to_the_same_file(results: Path, tmp_path: Path, kept: float) -> None:
    """Cut anywhere, as a kill or a full disk would: in the middle of a line and of a batch."""
    whole = results.with_suffix(".jsonl").read_bytes()
    journal = tmp_path / "cut.jsonl"
    journal.write_bytes(whole[: int(kept * len(whole))])
    evaluation.evaluate(settings(), tmp_path / "cut.json", "command")
    assert without_times(tmp_path / "cut.json") == without_times(results)
    assert sorted(journal.read_bytes().splitlines()) == sorted(whole.splitlines()), "an example was lost or run twice"


@pytest.mark.slow
def test_a_killed_command_resumes(results: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed.json"
    command = [*MIXQUANT, "eval", "demo", "-o", str(output), "--tasks", "arithmetic"]
    command += ["--arms", ",".join(ARMS), "--seeds", "100,101", "--limit", "3", "--max-prompt-tokens", "500"]
    command += ["--batch-size", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    journal = output.with_suffix(".jsonl")
    while process.poll() is None and not (journal.is_file() and '"uniform"' in journal.read_text()[-4000:]):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads(path.read_text()) for path in (output, results))
    assert ours["arms"] == theirs["arms"]
    assert done.stdout.strip() == theirs["verdict"]["sentence"]


def test_arms_one_by_one_equal_arms_together(
    backend: TransformersBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a backend cannot hold two arms at once, the reference's logits go through files."""
    tokenizer = load_tokenizer(find("demo"))
    items = load(["lookup"], 3, tokenizer, 500)
    work = batches(items, 2)
    found = []
    for together in (True, False):
        monkeypatch.setattr(backend, "together", together)
        journal = Journal(tmp_path / f"{together}.jsonl", {})
        Runner(backend, ARMS, tokenizer, journal).run(work)
        journal.close()
        found.append(journal.records)
    assert found[0] == found[1]
    assert len(found[0]) == 3 * len(ARMS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["False.jsonl", "True.jsonl"]


def test_logits_of_a_killed_run_are_cleared_and_nothing_else(tmp_path: Path) -> None:
    saved = SavedLogits(tmp_path / "results.logits")
    saved.folder.mkdir()
    (saved.folder / "17.pt").write_bytes(b"x")
    with saved.opened(3, 5):
        saved.put(0, [torch.ones(3, 5)])
        assert [path.name for path in saved.folder.iterdir()] == ["0.pt"]
        assert torch.equal(saved.get(0)[0], torch.ones(3, 5))
    assert not saved.folder.exists()
    saved.folder.mkdir()
    (saved.folder / "mine.txt").touch()
    with saved.opened(3, 5):
        pass
    assert [path.name for path in saved.folder.iterdir()] == ["mine.txt"]


def test_logits_that_do_not_fit_on_the_disk_are_refused_before_an_arm_opens(
    backend: TransformersBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "together", False)
    monkeypatch.setattr(backend, "open", lambda arm: pytest.fail("an arm was opened"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    tokenizer = load_tokenizer(find("demo"))
    items = load(["lookup"], 3, tokenizer, 500)
    with closing(Journal(tmp_path / "results.jsonl", {})) as journal:
        runner = Runner(backend, ARMS, tokenizer, journal)
        with pytest.raises(
            InputError, match=r"logits need up to 0\.\d MiB beside the output, where 0\.0 MiB are free: lower"
        ):
            runner.run(batches(items, 2))


def test_batches_depend_on_the_items_alone() -> None:
    tokenizer = load_tokenizer(find("demo"))
    items = load(["lookup", "toolcall"], 5, tokenizer, 800)
    work = batches(items, 2)
    assert work == batches(items[::-1], 2)
    for batch in work:
        assert len({(item.place.task, item.place.rung) for item in batch.items}) == 1
        lengths = [len(query.ids) for query in batch.queries]
        assert lengths == sorted(lengths)


def test_divergence_is_zero_only_between_equal_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 0.0]])
    assert divergence(logits, logits) == ([0.0, 0.0], [])
    kld, flips = divergence(logits, logits.flip(1))
    assert min(kld) > 0.1
    assert flips == [0, 1]


def test_an_unfinished_line_is_cut_off_before_more_is_written(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    record = Record(
        arm="bf16", task="t", rung=0, seed=0, index=0, label="", prompt_tokens=3, right=True, answer=[1], text="ü"
    )
    journal = Journal(path, {"seed": 0})
    journal.append([record])
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"arm": "bf16", "te')
    journal = Journal(path, {"seed": 0})
    journal.close()
    assert path.read_bytes() == whole
    assert list(journal.records.values()) == [record]


def test_a_task_file_that_has_changed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a b", "answer": "c", "checker": "exact", "max_tokens": 2}\n')
    mine = settings(arms=["bf16"], tasks=[str(file)], max_prompt_tokens=None)
    evaluation.evaluate(mine, tmp_path / "results.json", "command")
    file.write_text('{"prompt": "a b", "answer": "d", "checker": "exact", "max_tokens": 2}\n')
    with pytest.raises(InputError, match="examples was"):
        evaluation.evaluate(mine, tmp_path / "results.json", "command")


def test_answers_with_odd_line_breaks_are_one_line(tmp_path: Path) -> None:
    records = [
        Record(arm=arm, task="t", rung=0, seed=0, index=0, label="", prompt_tokens=3, right=True, answer=[1], text=text)
        for arm, text in (("bf16", "a\u2028b\x85c"), ("phase", "d\r\ne"))
    ]
    journal = Journal(tmp_path / "journal.jsonl", {})
    journal.append(records)
    journal.close()
    again = Journal(tmp_path / "journal.jsonl", {})
    again.close()
    assert list(again.records.values()) == records


def test_an_answer_ends_with_the_token_that_completes_a_stop_string(
    backend: TransformersBackend, tmp_path: Path
) -> None:
    """In all arms, and for the divergence too; the draft after it does not matter."""
    tokenizer = load_tokenizer(find("demo"))
    (item,) = load(["arithmetic"], 1, tokenizer, 500)[:1]
    cut = replace(item.question, stops=(" next=",), check=lambda text, answer: text.endswith(" next="))
    free, stopped = replace(cut, stops=()), cut
    questions = [(Place("t", 0, 0, index), question) for index, question in enumerate((free, stopped))]
    with closing(Journal(tmp_path / "journal.jsonl", {})) as journal:
        Runner(backend, ARMS, tokenizer, journal).run(batches(measure(tokenizer, questions), 2))
    for arm in ARMS:
        whole, first = (journal.records[arm, "t", 0, 0, index] for index in (0, 1))
        assert (whole.right, first.right) == (False, True)
        assert first.answer == whole.answer[: len(first.answer)]
        assert first.text == whole.text[: whole.text.index(" next=") + 6]
        assert arm == "bf16" or len(first.kld or []) == len(journal.records["bf16", "t", 0, 0, 1].answer)


def test_only_a_stop_string_that_is_written_cuts() -> None:
    tokenizer = load_tokenizer(find("demo"))
    ids = tokenizer("total=12\nanswer: 12", add_special_tokens=False).input_ids
    assert until(tokenizer, ids) == until(tokenizer, ids, "Question:") == ids
    assert tokenizer.decode(until(tokenizer, ids, "Question:", "\n")) == "total=12\n"
    assert until(tokenizer, [], "\n") == []
