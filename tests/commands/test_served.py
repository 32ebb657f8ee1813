"""`mixquant serve demo` from outside: one real server process (tests/servers.py), spoken to by the `openai` client.

Sixteen clients at once get what vLLM's offline engine answers one by one under the same policy. Their prompts make no
sense to the model, so that it is in doubt and quantization shows; the control quantizes nothing, and differs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from mixquant.checkpoint.locate import DEMO, find
from mixquant.errors import InputError
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.integrations.openai import ServerBackend
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.policy import CONTROL
from mixquant.prompts import encode
from mixquant.tasks import LADDER, TOOLS, Question, generate
from mixquant.tasks.transcript import ROLE
from tests.servers import TAIL, Server

pytest.importorskip("openai")

README = Path(__file__).parents[2] / "README.md"
CLIENTS = 16
NEW_TOKENS = 32
POLICY = {"prefill": "nvfp4", "tail": TAIL}
"""The server's."""


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


@contextmanager
def offline(policy: dict[str, Any]) -> Iterator[Any]:
    """vLLM's offline engine in this process, which takes one request after another."""
    from tests.integrations.vllm import engines

    alone = {"max_model_len": 3072, "max_num_batched_tokens": 3072, "max_num_seqs": 1, "enable_prefix_caching": False}
    with engines.running(DEMO, policy, skip_tokenizer_init=False, **alone) as llm:
        yield llm


def offline_replies(policy: dict[str, Any]) -> list[Reply]:
    """Its answers to the same chats."""
    from tests.integrations.vllm import engines

    greedy = engines.sampling(NEW_TOKENS)
    greedy.ignore_eos, greedy.detokenize = False, True
    with offline(policy) as llm:
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
    differences = greatest_differences(crowd.replies(), offline_replies(POLICY))
    assert max(differences) < math.inf
    assert sum(difference > 1e-5 for difference in differences) <= CLIENTS // 8, differences


def test_control_without_quantization_every_answer_differs(crowd: Crowd) -> None:
    differences = greatest_differences(crowd.replies(), offline_replies({"prefill": "bf16"}))
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


def api_messages(example: Question) -> list[dict[str, Any]]:
    """An example's chat as the API wants it: tool calls have ids and arguments as text, the tools come apart."""
    messages = [dict(message) for message in example.prompt]
    messages[0]["content"] = ROLE
    for place, message in enumerate(messages):
        if calls := message.get("tool_calls"):
            function = calls[0]["function"]
            written = {"name": function["name"], "arguments": json.dumps(function["arguments"])}
            message["tool_calls"] = [{"id": f"call-{place}", "type": "function", "function": written}]
        elif message["role"] == "tool":
            message["tool_call_id"] = f"call-{place - 1}"
    return messages


def complete(server: Server, example: Question, **options: Any) -> Any:
    """The model's answer to an example, greedily; a stream if the options say so."""
    return server.client().chat.completions.create(
        model="demo", messages=api_messages(example), tools=TOOLS, temperature=0, max_tokens=200, **options
    )


@pytest.mark.parametrize("task", ["lookup", "multihop", "arithmetic"])
def test_a_streamed_answer_is_the_whole_one_and_right(server: Server, task: str) -> None:
    example = generate(task, 0, seed=3, index=0)
    whole = complete(server, example).choices[0]
    pieces = [chunk.choices[0] for chunk in complete(server, example, stream=True)]
    assert example.is_right(whole.message.content)
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


def test_the_client_of_the_readme(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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


# As an arm of the evaluator


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(find("demo"))


def queries(tokenizer: PreTrainedTokenizerBase) -> list[Query]:
    """Chats with tool calls, a text, and a chat whose answer is cut off."""
    examples = [generate(task, 0, seed=3, index=1) for task in LADDER]
    chats = [list(example.prompt) for example in examples]
    ids = [encode(tokenizer, chat)[0].tolist() for chat in chats]
    asked = [Query(chat, tokens, 160) for chat, tokens in zip(chats, ids, strict=True)]
    text = str(tokenizer.decode(ids[0]))
    return [*asked, Query(text, ids[0], 160), Query(chats[0], ids[0], 7)]


def offline_answers(asked: list[Query], end: int) -> list[TokenIds]:
    """The offline engine's answers to the same tokens."""
    from tests.integrations.vllm import engines

    found = []
    with offline(POLICY) as llm:
        for query in asked:
            greedy = engines.sampling(query.limit)
            greedy.stop_token_ids = [end]
            (output,) = llm.generate([{"prompt_token_ids": query.ids}], greedy, use_tqdm=False)
            found.append(list(output.outputs[0].token_ids))
    return found


def test_an_arm_on_a_server_answers_as_the_offline_engine(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    """Token for token: the server reads the same prompts, and its answers are encoded as they were written."""
    asked = queries(tokenizer)
    end = tokenizer.eos_token_id
    expected = offline_answers(asked, end)
    for arm in ("phase", CONTROL):
        with closing(ServerBackend({arm: f"{server.url}/v1"}, "demo", tokenizer).open(arm)) as engine:
            assert engine.generate(asked) == expected
    assert [answer[-1] == end for answer in expected] == [True] * (len(asked) - 1) + [False]
    assert len(expected[-1]) == 7


def test_a_server_refuses_what_is_longer_than_its_context(server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
    urls = {"phase": f"{server.url}/v1"}
    with closing(ServerBackend(urls, "demo", tokenizer).open("phase")) as engine:
        with pytest.raises(InputError, match=r"refuses a request .*400: .*context length.*: check its context length"):
            engine.generate([Query("word " * 4000, [1] * 4000, 9)])
        with pytest.raises(InputError, match=r"serves demo, and not other as asked: start it with --served-model-na"):
            ServerBackend(urls, "other", tokenizer).open("phase")
