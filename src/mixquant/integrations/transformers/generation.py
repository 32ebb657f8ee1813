"""One prompt in, one answer out, with its times and the kernels that ran: what `mixquant generate` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mixquant.devices import device_name
from mixquant.errors import InputError
from mixquant.integrations.transformers.attention import without_cudnn_attention
from mixquant.integrations.transformers.loading import context_window
from mixquant.integrations.transformers.stopwatch import CONTENDED, TIMES, Stopwatch
from mixquant.model.explain import is_emulated, kernels_used


@dataclass(frozen=True)
class Generation:
    """An answer, and its times in milliseconds.

    Times are None where a kernel is emulated: they would say nothing about the format's speed. waiting: which share of
    the time the process's threads stood ready while other jobs had the cores; None on a GPU. The times are then longer
    than the kernels', and `..._cpu_ms` is what each thread computed in them.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    policy: dict[str, Any]
    device: str
    kernels: dict[str, list[str]]
    emulated: bool
    prefill_ms: float | None
    decode_ms_per_token: float | None
    waiting: float | None = None
    prefill_cpu_ms: float | None = None
    decode_cpu_ms_per_token: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        """One line for people: tokens, times, kernels, device."""
        used = ", ".join(f"{phase} {'+'.join(names)}" for phase, names in self.kernels.items())
        return f"[{self.prompt_tokens} prompt tokens; {self._times()}; {used}; {self.device}]"

    def _times(self) -> str:
        if self.emulated:
            return "emulated, so no times"
        text = f"prefill {self.prefill_ms} ms, decode {self.decode_ms_per_token} ms a token"
        if self.waiting is None or self.waiting < CONTENDED:
            return text
        own = f"prefill {self.prefill_cpu_ms} ms, decode {self.decode_cpu_ms_per_token} ms a token of CPU time a thread"
        return f"{text} (other jobs had the cores for {self.waiting:.0%} of it: {own})"


def check_length(config: PreTrainedConfig, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise InputError if prompt and answer exceed the model's context window."""
    window = context_window(config)
    if window is not None and prompt_tokens + max_new_tokens > window:
        raise InputError(
            f"{prompt_tokens} prompt tokens and up to {max_new_tokens} new ones exceed the context window of {window}: "
            "shorten the prompt or lower --max-new-tokens."
        )


@torch.inference_mode()
@without_cudnn_attention()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    max_new_tokens: int,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generation:
    """Greedy answer to token ids [1, n]; `on_text` gets each piece of text as it comes.

    A short forward comes first, so that no kernel is built inside the times. Nor does cuDNN build a plan for each token
    there: its attention is off.
    """
    check_length(model.config, ids.shape[1], max_new_tokens)
    ids = ids.to(model.device)
    model(ids[:, -64:])
    watch = Stopwatch(tokenizer, on_text, on_cpu=model.device.type == "cpu")
    with _greedy(model, max_new_tokens):
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=watch)
    policy, emulated = model.mixquant_policy.to_dict(), is_emulated(model)
    return Generation(
        text=watch.text(),
        token_ids=watch.token_ids,
        prompt_tokens=ids.shape[1],
        policy={key: policy[key] for key in ("prefill", "decode", "tail")},
        device=device_name(model.device),
        kernels=kernels_used(model),
        emulated=emulated,
        **dict.fromkeys(TIMES) if emulated else watch.times(),
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
