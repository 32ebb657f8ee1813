"""One prompt in, one answer out, with its times and the kernels that ran: what `mixquant generate` prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mixquant.devices import device_name
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import context_window
from mixquant.model.explain import is_emulated, kernels_used


@dataclass(frozen=True)
class Generation:
    """An answer. Times are None where a kernel is emulated: they would say nothing about the format's speed."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    policy: dict[str, Any]
    device: str
    kernels: dict[str, list[str]]
    emulated: bool
    prefill_ms: float | None
    decode_ms_per_token: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_length(config: PreTrainedConfig, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise InputError if prompt and answer exceed the model's context window."""
    window = context_window(config)
    if window is not None and prompt_tokens + max_new_tokens > window:
        raise InputError(
            f"{prompt_tokens} prompt tokens and up to {max_new_tokens} new ones exceed the context window of {window}: "
            "shorten the prompt or lower --max-new-tokens."
        )


class Stopwatch:
    """A streamer that notes when each token arrives and hands on the text as it grows, line by line decoded anew."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        self.tokenizer = tokenizer
        self.on_text = on_text
        self.token_ids: list[int] = []
        self.times: list[float] = []
        self._line = 0  # first token of the line that is being written
        self._shown = ""  # what of that line is out
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        if not self._prompt_seen:  # Transformers streams the prompt first
            self._prompt_seen = True
            return
        self.token_ids += value.flatten().tolist()
        self.times.append(time.perf_counter())
        line = self._text(self._line)
        if not line.endswith("\ufffd"):  # else a character is not complete yet
            self._show(line)
        if line.endswith("\n"):
            self._line, self._shown = len(self.token_ids), ""

    def end(self) -> None:
        """Hand on what was held back."""
        self._show(self._text(self._line))

    def text(self) -> str:
        return self._text(0)

    def _show(self, line: str) -> None:
        self.on_text(line[len(self._shown) :])
        self._shown = line

    def _text(self, first: int) -> str:
        return str(self.tokenizer.decode(self.token_ids[first:], skip_special_tokens=True))


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generation:
    """Greedy answer to token ids [1, n]; `on_text` gets each piece of text as it comes.

    A short forward comes first, so that no kernel is built inside the times.
    """
    check_length(model.config, ids.shape[1], max_new_tokens)
    ids = ids.to(model.device)
    model(ids[:, -64:])
    watch = Stopwatch(tokenizer, on_text)
    start = time.perf_counter()
    with _greedy(model, max_new_tokens):
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=watch)
    emulated = is_emulated(model)
    prefill_ms = (watch.times[0] - start) * 1e3
    decode_ms = (watch.times[-1] - watch.times[0]) * 1e3 / max(len(watch.times) - 1, 1)
    policy = model.mixquant_policy.to_dict()
    return Generation(
        text=watch.text(),
        token_ids=watch.token_ids,
        prompt_tokens=ids.shape[1],
        policy={key: policy[key] for key in ("prefill", "decode", "tail")},
        device=device_name(model.device),
        kernels=kernels_used(model),
        emulated=emulated,
        prefill_ms=None if emulated else round(prefill_ms, 2),
        decode_ms_per_token=None if emulated or len(watch.times) < 2 else round(decode_ms, 3),
    )


@contextmanager
def _greedy(model: PreTrainedModel, max_new_tokens: int) -> Iterator[None]:
    """Let `generate` take the likeliest token each time, whatever the checkpoint's generation_config.json asks for.

    Beams, penalties, sampling and stop strings there would change the answer, and some of them refuse a streamer.
    """
    before = model.generation_config
    tokens = {name: getattr(before, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, **tokens)
    try:
        yield
    finally:
        model.generation_config = before
