"""Task files: what a line may hold, and the one sentence for each way it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixquant.errors import InputError
from mixquant.evaluate.suites.files import read

GOOD = {"prompt": "6 times 7?", "answer": 42, "checker": "number"}


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_lines_become_examples_in_their_order(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Größe?"}]
    path = write(
        tmp_path,
        GOOD,
        "",
        {"prompt": chat, "answer": "B", "checker": "choice", "max_tokens": 7, "reference": "B"},
        {**GOOD, "reference": "It is 42."},
    )
    plain, chosen, worked = read(path)
    assert (plain.prompt, plain.limit, plain.reference) == ("6 times 7?", None, "")
    assert plain.is_right("It is 42")
    assert not plain.is_right("It is 41")
    assert (chosen.prompt, chosen.limit, chosen.reference) == (chat, 7, "B")
    assert (worked.limit, worked.reference) == (None, "It is 42.")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{]", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"answer": 1, "checker": "number"}, 'no "prompt": add it.'),
        ({"prompt": "x", "checker": "number"}, 'no "answer": add it.'),
        ({"prompt": "x", "answer": 1}, 'no "checker": add it.'),
        ({**GOOD, "max_token": 5}, "Unknown key 'max_token': did you mean max_tokens?"),
        ({**GOOD, "checker": "nubmer"}, "Unknown checker 'nubmer': did you mean number?"),
        ({**GOOD, "checker": ["number"]}, "Unknown checker"),
        ({**GOOD, "answer": "many"}, "checker number compares with a number, not 'many'"),
        ({**GOOD, "prompt": " \n"}, "the prompt is empty"),
        ({**GOOD, "prompt": []}, "the prompt holds no chat"),
        ({**GOOD, "prompt": [{"content": "no role"}]}, "message 1 of the prompt holds no chat message"),
        ({**GOOD, "max_tokens": 0}, "1 or more, not 0"),
        ({**GOOD, "max_tokens": True}, "1 or more, not True"),
        ({**GOOD, "reference": 42}, "the reference is no text"),
        ("[" * 100_000, "nested too deeply"),
        (r'{"prompt": "a\ud800", "answer": 1, "checker": "number"}', "half a character"),
        ('{"prompt": "a", "answer": NaN, "checker": "json"}', "NaN and Infinity are no values"),
        ('{"prompt": "a", "answer": [{"b": 1e999}], "checker": "json"}', "NaN and Infinity are no values"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: Any, complaint: str) -> None:
    path = write(tmp_path, GOOD, "", line, "{also bad")
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 3")
    assert complaint in str(error.value)
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_files_that_hold_no_examples(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no examples: give lines such as"):
        read(write(tmp_path, "", "  "))
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps({**GOOD, "prompt": "Größe"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8 text: save it as UTF-8"):
        read(latin)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path)


def test_the_example_in_the_docs_is_a_task_file(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "tasks.md").read_text(encoding="utf-8")
    lines = text.partition("```jsonl\n")[2].partition("```")[0].splitlines()
    number, choice, order = read(write(tmp_path, *lines))
    assert number.is_right("42.")
    assert choice.is_right("(B) blue")
    assert order.is_right('{"count": 3, "item": "pen"}')
    assert not order.is_right('{"count": 4, "item": "pen"}')
