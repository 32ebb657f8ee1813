"""`mixquant generate`: one prompt, one answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mixquant.checkpoint.locate import find
from mixquant.commands.heartbeat import heartbeat
from mixquant.errors import InputError
from mixquant.integrations.transformers import generation
from mixquant.integrations.transformers.generation import Generation, check_length
from mixquant.integrations.transformers.loading import load_config, load_model, load_tokenizer
from mixquant.policy import Policy
from mixquant.prompts import Prompt, encode, read_prompt


def asked(prompt: str | None, file: Path | None) -> Prompt:
    """What the user asks, as a text or in a file; InputError for both and for neither."""
    if (prompt is None) == (file is None):
        raise InputError("Give the prompt either as --prompt TEXT or as --prompt-file FILE.")
    return prompt or "" if file is None else read_prompt(file)


def run(
    model: str,
    prompt: Prompt,
    policy: Policy,
    device: torch.device,
    max_new_tokens: int,
    on_text: Callable[[str], None],
) -> Generation:
    """Load MODEL and answer; `on_text` gets each piece of text as it comes."""
    found = find(model)
    with heartbeat("generate") as stage:
        tokenizer = load_tokenizer(found)
        ids = encode(tokenizer, prompt)
        check_length(load_config(found), ids.shape[1], max_new_tokens)
        stage("loading the model")
        loaded = load_model(found, policy, device)
        stage(f"reading {ids.shape[1]} tokens and writing the answer")
        return generation.generate(loaded, tokenizer, ids, max_new_tokens, on_text)


def show(answer: Generation) -> None:
    """Print what ran, behind an answer that has been printed as it came."""
    print()
    print(answer.summary(), file=sys.stderr)
