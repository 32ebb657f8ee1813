"""Every file that mixquant reads, damaged at random: it is read all the same, or refused in one sentence.

Each document is a valid one of its kind, in which one value, key or byte is replaced by something else. Whatever then
happens that is no InputError of one line is a traceback for a user.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixquant.bench import workloads
from mixquant.bench.workloads import NAMED
from mixquant.checkpoint.locate import find
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.shards import INDEX
from mixquant.checkpoint.sidecar import SIDECAR, read_sidecar
from mixquant.errors import InputError
from mixquant.evaluate.suites import files as task_files
from mixquant.offline import calibration_text
from mixquant.prompts import read_prompt
from mixquant.report import render
from tests.bench import sample
from tests.conftest import tiny_qwen3
from tests.folders import name_decode_model, write_quantized

EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.just([[]]), st.just({"": None}), st.just(-1), st.just(10**30), st.just("/"), st.just([1, "a", None]),
)  # fmt: skip
"""What no document expects anywhere."""


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    yield path
    inner = dict(enumerate(document)) if isinstance(document, list) else document
    for key, value in inner.items() if isinstance(inner, dict) else ():
        yield from places(value, (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place."""
    if not path:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


@contextmanager
def damaged(file: Path, data: st.DataObject) -> Iterator[None]:
    """A JSON file with one value replaced, for the time inside."""
    original = file.read_text()
    document = json.loads(original)
    path = data.draw(st.sampled_from(list(places(document))))
    file.write_text(json.dumps(replaced(document, path, data.draw(ODD))))
    try:
        yield
    finally:
        file.write_text(original)


def one_sentence(read: Callable[[], object]) -> None:
    """Fails where reading raises anything but an InputError of one line."""
    sentence = refusal(read)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?", "!"))


def refusal(read: Callable[[], object]) -> str:
    try:
        read()
    except InputError as error:
        return str(error)
    return "It is read."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_qwen3(torch.bfloat16, num_hidden_layers=1).save_pretrained(path)
    index = {"metadata": {"total_size": 1}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}
    (path / INDEX).write_text(json.dumps(index))
    return path


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_quantized(model, tmp_path_factory.mktemp("quantized") / "q")
    name_decode_model(path, model, {"prefill": "nvfp4"})
    (path / "hf_quant_config.json").write_text('{"producer": {"name": "x"}, "quantization": {"quant_algo": "NVFP4"}}')
    return path


@EXAMPLES
@given(data=st.data())
@pytest.mark.parametrize("name", ["config.json", SIDECAR, "hf_quant_config.json"])
def test_settings_of_a_quantized_folder(folder: Path, name: str, data: st.DataObject) -> None:
    with damaged(folder / name, data):
        one_sentence(lambda: find(folder))
        one_sentence(lambda: read_sidecar(folder))


@EXAMPLES
@given(data=st.data())
def test_indexes_of_shards(model: Path, data: st.DataObject) -> None:
    with damaged(model / INDEX, data):
        one_sentence(lambda: find(model))


@EXAMPLES
@given(data=st.data())
def test_headers_of_shards(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    """The header's JSON with one value replaced, its length kept true; and single bytes anywhere in it."""
    file = folder / "model.safetensors"
    original = file.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, body = json.loads(original[8 : 8 + length]), original[8 + length :]
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from([name for name in header if "proj" in name]))
        path = (name, *data.draw(st.sampled_from(list(places(header[name])))))
        text = json.dumps(replaced(header, path, data.draw(ODD))).encode()
        damaged = len(text).to_bytes(8, "little") + text + body
    else:
        place = data.draw(st.integers(0, 8 + length - 1))
        damaged = original[:place] + bytes([data.draw(st.integers(0, 255))]) + original[place + 1 :]
    copied = tmp_path / "q"
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(folder, copied)
    (copied / "model.safetensors").write_bytes(damaged)

    def read() -> None:
        found = QuantizedFolder(copied)
        for layer in found.layers():
            found.describe(layer)
            if found.format(layer) != "bf16":
                found.read(layer)

    one_sentence(read)


CHAT = {
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}
TASK = {"prompt": CHAT["messages"], "answer": "x", "checker": "exact", "max_tokens": 3, "reference": "x"}

AGENT = NAMED["agent"].model_dump(mode="json")

READERS: dict[str, tuple[str, Any, Callable[[Path], object]]] = {
    "prompt": ("prompt.json", CHAT, read_prompt),
    "task": ("tasks.jsonl", TASK, task_files.read),
    "calibration, one": ("text.json", CHAT, lambda path: list(calibration_text._documents(path))),
    "workload": ("w.json", AGENT, lambda path: [list(each.cases()) for each in workloads.read([str(path)])]),
    "benchmark": ("bench.json", json.loads(sample.results().to_json()), lambda path: render([path], Path("r.md"))),
    "calibration, many": ("text.jsonl", CHAT, lambda path: list(calibration_text._documents(path))),
}


@EXAMPLES
@given(data=st.data())
@pytest.mark.parametrize("kind", READERS)
def test_what_users_write(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    name, document, read = READERS[kind]
    path = data.draw(st.sampled_from(list(places(document))))
    text = json.dumps(replaced(document, path, data.draw(ODD)))
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(st.sampled_from(["", "{", '"', "\\ud800", "[" * 100_000])) + text[place + 1 :]
    (tmp_path / name).write_text(text + "\n")
    one_sentence(lambda: read(tmp_path / name))


@pytest.mark.parametrize("kind", READERS)
def test_control_the_documents_themselves_are_read(tmp_path: Path, kind: str) -> None:
    name, document, read = READERS[kind]
    (tmp_path / name).write_text(json.dumps(document) + "\n")
    assert read(tmp_path / name)


def test_control_a_traceback_is_noticed() -> None:
    def fails() -> None:
        raise KeyError("a")

    with pytest.raises(KeyError):
        one_sentence(fails)
    with pytest.raises(AssertionError):
        one_sentence(lambda: (_ for _ in ()).throw(InputError("One line,", "and another.")))


def test_a_sentence_that_quotes_a_name_of_several_lines_stays_one() -> None:
    assert str(InputError("There is no a\nb\u2028c: name another.")) == "There is no a b c: name another."
    assert str(InputError("It ended; its last lines:", "one\ntwo")) == "It ended; its last lines:\none\ntwo"
