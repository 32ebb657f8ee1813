"""`mixquant generate` writes the likeliest token each time, whatever generation_config.json asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BloomConfig, GPT2Config, MptConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config

import mixquant
from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.integrations.transformers.generation import check_length, generate
from mixquant.integrations.transformers.loading import context_window, load_tokenizer
from tests.conftest import PHASE, tiny_qwen3

IDS = torch.tensor([[5, 9, 3, 7, 5, 9, 3, 7, 5, 9]])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(find("demo"))


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return mixquant.convert_(tiny_qwen3(vocab_size=len(tokenizer)), PHASE)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return generate(model, tokenizer, IDS, 8).token_ids


SETTINGS: list[dict[str, Any]] = [
    {"num_beams": 3},
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    {"do_sample": True, "temperature": 5.0, "top_k": 50},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"stop_strings": ["e"]},
    {"repetition_penalty": 3.0},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 20, "max_length": 4},
    {"forced_eos_token_id": 1},
    {"suppress_tokens": list(range(200))},
    {"guidance_scale": 1.5},
    {"num_return_sequences": 2, "num_beams": 2},
    {"prompt_lookup_num_tokens": 3},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"return_dict_in_generate": True, "output_scores": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_the_answer_is_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, greedy: list[int], settings: dict[str, Any]
) -> None:
    before = model.generation_config.to_dict()
    model.generation_config.update(**settings)
    try:
        assert generate(model, tokenizer, IDS, 8).token_ids == greedy
    finally:
        model.generation_config = type(model.generation_config)(**before)


def test_control_settings_reach_generate_elsewhere(model: PreTrainedModel, greedy: list[int]) -> None:
    answer = model.generate(IDS, max_new_tokens=8, do_sample=False, repetition_penalty=3.0)
    assert answer[0, IDS.shape[1] :].tolist() != greedy


def test_an_end_of_turn_token_ends_the_answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, greedy: list[int]
) -> None:
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [greedy[2]]
    try:
        answer = generate(model, tokenizer, IDS, 8).token_ids
    finally:
        model.generation_config.eos_token_id = before
    assert answer == greedy[: greedy.index(greedy[2]) + 1]


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (Qwen3Config(max_position_embeddings=100), 100),
        (GPT2Config(n_positions=101), 101),
        (MptConfig(max_seq_len=102), 102),
        (BloomConfig(seq_length=103), 103),
        (BloomConfig(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_context_window_is_found_under_every_name(config: Any, window: int | None) -> None:
    assert context_window(config) == window
    check_length(config, 40, 60)
    if window is not None:
        with pytest.raises(InputError, match=f"exceed the context window of {window}"):
            check_length(config, 60, 60)


def test_control_a_window_of_another_kind_is_none() -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=None, seq_length="long"))
    assert context_window(config) is None
