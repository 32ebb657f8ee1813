"""Long-context retrieval: as long as it says, answerable from its records, needles at every depth."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from mixquant.checkpoint.locate import find
from mixquant.evaluate.engine import Query
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.prompts import encode
from mixquant.tasks import generate as agent_example
from mixquant.tasks import retrieval
from mixquant.tasks.question import result
from mixquant.tasks.retrieval import ANSWER_TOKENS, DEPTHS, FORM, generate


@pytest.fixture(scope="module")
def demo() -> Any:
    return load_tokenizer(find("demo"))


@pytest.fixture(scope="module")
def coarse(demo: Any) -> Any:
    """A tokenizer with whole numbers and words as tokens, under the same chat template."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=3000, initial_alphabet=alphabet, special_tokens=["<|im_end|>"])
    texts = [json.dumps(agent_example("lookup", 3, 9, i).prompt) for i in range(40)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=demo.chat_template)


def records(messages: list[Any]) -> list[dict[str, Any]]:
    pages = [json.loads(m["content"]) for m in messages if m["content"].startswith('{"page"')]
    return [record for page in pages for record in page["records"]]


def asked(messages: list[Any]) -> list[str]:
    return messages[-1]["content"].removeprefix("Sort qty of ").removesuffix(".").split(", ")


@pytest.mark.parametrize("length", [1024, 2048, 3072, 16384])
@pytest.mark.parametrize("name", ["demo", "coarse"])
def test_prompt_is_as_long_as_promised(request: pytest.FixtureRequest, name: str, length: int) -> None:
    tokenizer = request.getfixturevalue(name)
    for index in range(3):
        haystack = generate(tokenizer, length, seed=5, index=index)
        prompt = encode(tokenizer, haystack.prompt).shape[1]
        assert 0.98 * (length - ANSWER_TOKENS) <= prompt <= length - ANSWER_TOKENS
        assert len(tokenizer(haystack.reference).input_ids) < ANSWER_TOKENS


def test_two_tokenizers_read_the_same_records_in_different_hay(demo: Any, coarse: Any) -> None:
    one, other = (generate(tokenizer, 2048, seed=5, index=3) for tokenizer in (demo, coarse))
    assert records(one.prompt) == records(other.prompt)
    assert (one.reference, one.answer) == (other.reference, other.answer)
    assert one.prompt != other.prompt


def test_the_answer_follows_from_the_records(demo: Any) -> None:
    for index in range(DEPTHS):
        haystack = generate(demo, 1024, seed=5, index=index)
        quantities = {record["id"]: record["qty"] for record in records(haystack.prompt)}
        first, second = asked(haystack.prompt)
        assert haystack.answer == ",".join(map(str, sorted([quantities[first], quantities[second]])))
        assert haystack.reference == (
            f"{first}.qty={quantities[first]}\n{second}.qty={quantities[second]}\nanswer: {haystack.answer}"
        )
        assert haystack.is_right(haystack.reference)
        assert FORM in haystack.prompt[0]["content"]


def test_needles_stand_at_every_depth_and_half_a_transcript_apart(demo: Any) -> None:
    depths = []
    for index in range(DEPTHS):
        haystack = generate(demo, 2048, seed=5, index=index)
        text = demo.apply_chat_template(haystack.prompt, tokenize=False)
        places = [text.index(f'{{"id":"{key}"') / len(text) for key in asked(haystack.prompt)]
        assert 0.3 < abs(places[0] - places[1]) < 0.6
        depths.append(places[0])
    assert depths == sorted(depths)
    assert depths[0] < 0.3
    assert depths[-1] > 0.8


def test_examples_depend_on_length_seed_and_index_alone(demo: Any) -> None:
    assert generate(demo, 1024, 1, 2) == generate(demo, 1024, 1, 2)
    keys = [(1024, 1, 2), (1024, 1, 12), (1024, 2, 2), (2048, 1, 2)]
    assert len({json.dumps(generate(demo, *key).prompt) for key in keys}) == len(keys)


def test_models_without_a_chat_template_read_the_same_in_words(demo: Any) -> None:
    chat, words = generate(demo, 2048, seed=5, index=3), generate(without_template(demo), 2048, seed=5, index=3)
    assert (words.reference, words.answer) == (chat.reference, chat.answer)
    assert isinstance(words.prompt, str)
    assert words.prompt.startswith("System: ")
    assert f"Assistant: {json.dumps([call(1)])}" in words.prompt
    assert words.prompt.endswith(f"User: {chat.prompt[-1]['content']}\n\nAssistant: ")
    assert 0.98 * 2000 <= len(demo(words.prompt).input_ids) <= 2000


def without_template(tokenizer: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    return other


def call(page: int) -> dict[str, Any]:
    return {"name": "list_records", "arguments": {"page": page}}


def test_known_example(demo: Any) -> None:
    """The stream of random numbers must not change: published results depend on it."""
    haystack = generate(demo, 1024, 0, 0)
    assert haystack.reference == "789.qty=831\n201.qty=714\nanswer: 714,831"
    assert hashlib.sha256(json.dumps(haystack.prompt).encode()).hexdigest()[:16] == "8399faa93b0fc26b"


def test_lengths_are_round_and_grow() -> None:
    assert retrieval.LENGTHS[:5] == (1024, 2048, 3072, 4096, 8192)
    assert retrieval.LENGTHS[-1] == 1 << 20
    assert list(retrieval.LENGTHS) == sorted(set(retrieval.LENGTHS))


@pytest.mark.slow
def test_the_demo_model_finds_the_needles_in_bf16_at_1k(demo: Any) -> None:
    """Within the length it was trained for; that it fails beyond is what the longer rungs are for."""
    engine = TransformersBackend.load(find("demo"), "int8", torch.device("cpu")).open("bf16")
    haystacks = [generate(demo, 1024, seed=5, index=index) for index in range(6)]
    prompts = [encode(demo, haystack.prompt)[0].tolist() for haystack in haystacks]
    answers = engine.generate([Query("", prompt, ANSWER_TOKENS) for prompt in prompts])
    texts = demo.batch_decode(answers, skip_special_tokens=True)
    right = [result(text) == haystack.answer for text, haystack in zip(texts, haystacks, strict=True)]
    assert sum(right) >= 5
