"""lm-eval's own evaluator on local tasks, with our model: both kinds of requests, in every arm.

The model is the shipped one in float32, so that the rounding of kernels is far below what quantization does. What the
arms must give is computed by hand: one plain forward over context and continuation, its prompt length declared.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.evaluate.engine import Query
from mixquant.integrations.lm_eval import MixQuantLM
from mixquant.integrations.lm_eval import run as command_line
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.model.tracking import prompt_length
from mixquant.policy import arm as arm_policy
from mixquant.tasks import generate
from tests.commandline import run

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
ARMS = ("bf16", "uniform", "phase", "decode-only")
TASK = """
task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
test_split: test
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""
CHOICE = 'doc_to_choice: "{{choices}}"\nmetric_list:\n  - metric: acc'
ANSWER = """generation_kwargs:
  until: ["<|stop|>"]
  max_gen_toks: 48
filter_list:
  - name: result
    filter:
      - function: regex
        regex_pattern: "answer: ([0-9,]+)"
      - function: take_first
metric_list:
  - metric: exact_match"""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(find("demo"))


@pytest.fixture(scope="module")
def backend() -> TransformersBackend:
    return TransformersBackend(load_model(find("demo"), arm_policy("phase", "nvfp4"), CPU, dtype=torch.float32))


@pytest.fixture(scope="module")
def model(backend: TransformersBackend, tokenizer: Any) -> Any:
    """Our model of lm-eval, by arm."""
    return lambda arm, window=3072, batch_size=4: MixQuantLM(backend.open(arm), arm, tokenizer, window, batch_size)


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[dict[str, Any]]:
    """Questions of the agent ladder, each with its right first step and a wrong one to choose from."""
    found = []
    for index in range(3):
        example = generate("lookup", 0, 7, index)
        text = tokenizer.apply_chat_template(example.prompt, add_generation_prompt=True, tokenize=False)
        first = example.reference.partition("\n")[0]
        wrong = first[:-1] + str((int(first[-1]) + 1) % 10)
        found.append({"text": text, "choices": [wrong, first], "label": 1, "answer": example.answer})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """Three tasks on the rows: choose, answer, and the perplexity of the prompts."""
    path = tmp_path_factory.mktemp("tasks")
    data = path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    perplexity = "metric_list:\n  - metric: word_perplexity"
    for name, kind, text, target, more in (
        ("choose", "multiple_choice", "{{text}}", "label", CHOICE),
        ("answer", "generate_until", "{{text}}", "{{answer}}", ANSWER),
        ("perplexity", "loglikelihood_rolling", "", "{{text}}", perplexity),
    ):
        task = TASK.format(name=f"local_{name}", kind=kind, rows=data, text=text, target=target, more=more)
        (path / f"{name}.yaml").write_text(task)
    return path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def evaluate(model: MixQuantLM, folder: Path, *tasks: str, **options: Any) -> dict[str, Any]:
    """Results of lm-eval, with the model's every answer."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, log_samples=True, bootstrap_iters=0, **options
    )


def by_hand(tokenizer: Any, arm: str, context: str, continuation: str) -> float:
    """Log-probability of a continuation from one forward of a model converted to the arm's own policy."""
    start = len(tokenizer(context).input_ids)
    ids = torch.tensor([tokenizer(context + continuation).input_ids])
    model = load_model(find("demo"), arm_policy(arm, "nvfp4"), CPU, dtype=torch.float32)
    with torch.inference_mode(), prompt_length(model, start):
        logprobs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return float(logprobs[start - 1 : -1].gather(-1, ids[0, start:, None]).sum())


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


def test_both_kinds_of_requests_give_lm_evals_results(model: Any, folder: Path, rows: list[dict[str, Any]]) -> None:
    results = evaluate(model("phase"), folder, "local_choose", "local_answer")
    assert results["results"]["local_choose"]["acc,none"] == 1
    assert results["results"]["local_answer"]["exact_match,result"] == 1
    for sample, row in zip(results["samples"]["local_answer"], rows, strict=True):
        assert sample["resps"][0][0].endswith(f"answer: {row['answer']}")
    assert results["config"]["kernels"]["prefill"] == ["emulation.nvfp4"]


def test_every_arm_scores_a_continuation_as_decode(model: Any, tokenizer: Any) -> None:
    """A context that makes no sense leaves the model in doubt, so quantization shows in both phases."""
    context, continuation = "oslo 482 retry; " * 12 + "lima", " heartbeat 137 ms, 904 riga timeout"
    found = {arm: model(arm).loglikelihood(requests((context, continuation)))[0] for arm in ARMS}
    wanted = {arm: by_hand(tokenizer, arm, context, continuation) for arm in ARMS}
    for arm in ARMS:
        assert found[arm][0] == pytest.approx(wanted[arm], abs=1e-3)
    values = sorted(wanted.values())
    assert min(b - a for a, b in pairwise(values)) > 0.05  # the control: no two arms agree


def test_greedy_means_every_token_is_the_models_choice(model: Any, rows: list[dict[str, Any]]) -> None:
    (context, wrong), (_, right) = ((rows[0]["text"] + first[:3], first[3:]) for first in rows[0]["choices"])
    worse, better = model("bf16").loglikelihood(requests((context, wrong), (context, right)))
    assert (worse[1], better[1]) == (False, True)
    assert worse[0] < better[0]


def test_an_empty_context_is_the_start_of_a_text(model: Any, tokenizer: Any) -> None:
    ((value, _),) = model("bf16").loglikelihood(requests(("", "oslo")))
    assert value == pytest.approx(by_hand(tokenizer, "bf16", "<|im_end|>", "oslo"), abs=1e-3)
    empty, start = model("bf16").generate_until(
        requests(("", {"max_gen_toks": 4}), ("<|im_end|>", {"max_gen_toks": 4}))
    )
    assert empty == start


def test_results_do_not_depend_on_the_batch_and_come_in_order(model: Any, rows: list[dict[str, Any]]) -> None:
    asked = requests(*((row["text"][-60 * i :], choice) for i, row in enumerate(rows, 1) for choice in row["choices"]))
    one, many = (model("phase", batch_size=size).loglikelihood(asked) for size in (1, 4))
    assert [value for value, _ in one] == pytest.approx([value for value, _ in many], abs=1e-3)
    assert len({round(value, 2) for value, _ in one}) == len(one)


def test_answers_end_at_the_first_stop_string_and_at_the_limit(model: Any, rows: list[dict[str, Any]]) -> None:
    text = rows[0]["text"]
    full, stopped, either, short = model("bf16").generate_until(
        requests(
            (text, {"until": ["<|stop|>"], "max_gen_toks": 48}),
            (text, {"until": "\n", "max_gen_toks": 48}),
            (text, {"until": ["answer", ".qty", ""], "max_gen_toks": 48, "do_sample": False, "temperature": 0.0}),
            (text, {"max_new_tokens": 3}),
        )
    )
    assert full.endswith(f"answer: {rows[0]['answer']}")
    assert stopped == full.partition("\n")[0]
    assert either == full.partition(".qty")[0]
    assert short == full[:3]  # digits are tokens


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"do_sample": True}, "samples its answers"),
        ({"temperature": 0.7}, "samples its answers"),
        ({"repetition_penalty": 1.1}, "Unknown generation argument 'repetition_penalty'"),
        ({"max_gen_toks": 3072}, "up to 3072 tokens does not fit the context window of 3072"),
    ],
)
def test_what_is_not_greedy_or_does_not_fit_is_refused(model: Any, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        model("bf16").generate_until(requests(("x", {"until": [], **arguments})))


def test_a_prompt_that_is_too_long_loses_its_beginning_with_a_warning(
    model: Any, backend: TransformersBackend, tokenizer: Any, rows: list[dict[str, Any]], caplog: Any
) -> None:
    ids = tokenizer(rows[0]["text"]).input_ids
    (answer,) = model("bf16", window=150).generate_until(requests((rows[0]["text"], {"max_gen_toks": 40})))
    assert f"{len(ids)} tokens loses its beginning: 110 fit" in caplog.text
    cut, whole = (backend.open("bf16").generate([Query("", part, 40)])[0] for part in (ids[-110:], ids))
    assert answer == tokenizer.decode(cut, skip_special_tokens=True)
    assert cut != whole


def test_chat_templates_are_the_tokenizers(model: Any, tokenizer: Any, folder: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    ours = model("bf16")
    assert ours.apply_chat_template(chat) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert ours.chat_template(True) == tokenizer.chat_template
    results = evaluate(ours, folder, "local_choose", apply_chat_template=True, limit=1)
    (sample,) = results["samples"]["local_choose"]
    assert sample["arguments"][0][0].startswith("<|im_start|>user\n<|im_start|>system")


def test_the_perplexity_of_a_text_is_pure_prefill(model: Any, tokenizer: Any, folder: Path) -> None:
    text = "oslo 482 retry lima 137 heartbeat"
    for arm in ("bf16", "uniform"):
        (value,) = model(arm).loglikelihood_rolling(requests((text,)))
        assert value == pytest.approx(by_hand(tokenizer, arm, "<|im_end|>", text), abs=1e-3)
    for arm, same in (("phase", "uniform"), ("decode-only", "bf16")):
        with pytest.raises(InputError, match=f"in arm={arm} the same as in arm={same}: say arm={same}"):
            model(arm).loglikelihood_rolling(requests((text,)))
    found = [
        evaluate(model(arm), folder, "local_perplexity", limit=1)["samples"]["local_perplexity"][0]["resps"][0][0]
        for arm in ("bf16", "uniform")
    ]
    assert abs(found[0] - found[1]) > 1


def test_a_text_beyond_the_window_is_read_in_windows(model: Any, tokenizer: Any) -> None:
    """Every token is predicted once, with as much before it as fits."""
    text = "oslo 482 retry lima 137 heartbeat riga " * 2
    ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids]
    window = 10
    (value,) = model("bf16", window=window).loglikelihood_rolling(requests((text,)))
    engine = model("bf16").engine
    total = 0.0
    starts = range(0, len(ids) - 1, window - 1)
    for start in starts:
        stop = min(start + window - 1, len(ids) - 1)
        answer = ids[start + 1 : stop + 1]
        context = ids[max(0, stop - window + 1) : start + 1]
        (logits,) = engine.score([Query("", context, len(answer))], [answer])
        total += float(logits.double().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum())
    assert len(starts) > 2
    assert value == pytest.approx(total, abs=1e-3)


def test_answers_are_kept_for_a_run_that_is_repeated(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own response cache: the second run asks the engine nothing."""
    first = evaluate(model("bf16"), folder, "local_choose", use_cache=str(tmp_path / "cache"))
    unasked = model("bf16")
    monkeypatch.setattr(unasked.engine, "score", None)
    second = evaluate(unasked, folder, "local_choose", use_cache=str(tmp_path / "cache"))
    assert first["results"]["local_choose"] == second["results"]["local_choose"]


def test_model_arguments_go_before_what_lm_eval_adds() -> None:
    added = {"batch_size": 1, "device": "cpu", "max_batch_size": None}
    ours = MixQuantLM.create_from_arg_string("pretrained=demo,prefill=int8,arm=uniform,batch_size=8", added)
    assert (ours.arm, ours.batch_size, ours.max_length) == ("uniform", 8, 3072)
    assert ours.engine.kernels["decode"] == ours.engine.kernels["prefill"] != []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_the_cuda_device_that_lm_eval_assumes_is_not_required(caplog: pytest.LogCaptureFixture) -> None:
    MixQuantLM.create_from_arg_obj({"pretrained": "demo", "prefill": "int8"}, {"device": "cuda:0"})
    assert "running on the CPU" in caplog.text
    with pytest.raises(InputError, match="There is no CUDA device 1 here"):
        MixQuantLM.create_from_arg_obj({"pretrained": "demo"}, {"device": "cuda:1"})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("pretrained=demo,arn=phase", "Unknown model argument 'arn': did you mean arm?"),
        ("pretrained=demo,arm=fase", "Unknown arm 'fase': did you mean phase?"),
        ("pretrained=demo,prefill=nvfp5", "did you mean nvfp4?"),
        ("arm=phase", "No model is named"),
        ("pretrained=demo,batch_size=auto", "batch_size is a number of requests, not 'auto'"),
    ],
)
def test_bad_model_arguments_are_one_sentence(arguments: str, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        MixQuantLM.create_from_arg_string(arguments, {"device": "cpu", "batch_size": 1})
    assert complaint in str(error.value)


def test_the_sentence_comes_through_lm_evals_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    model = ["--model", "mixquant", "--model_args", "pretrained=demo,arm=fase"]
    with pytest.raises(InputError, match="Unknown arm 'fase'"):
        command_line([*model, "--tasks", "local_choose", "--include_path", str(folder)])


def test_the_command_is_lm_evals_own(folder: Path, tmp_path: Path) -> None:
    model = ("--model", "mixquant", "--model_args", "pretrained=demo,prefill=int8,arm=phase", "--device", "cpu")
    where = ("--include_path", folder, "--output_path", tmp_path, "--limit", "1")
    result = run("lm-eval", *model, "--tasks", "local_choose,local_answer", *where)
    assert result.returncode == 0, result.stderr
    assert "|local_answer|" in result.stdout.replace(" ", "")
    (written,) = tmp_path.rglob("results_*.json")
    report = json.loads(written.read_text())
    assert report["results"]["local_answer"]["exact_match,result"] == 1
    assert report["config"]["arm"] == "phase"


def test_without_lm_eval_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; sys.argv[1:] = ['lm-eval', 'ls', 'tasks']\n"
    code += "from mixquant.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "mixquant: lm-eval is not installed: pip install 'mixquant[eval]'.\n"
