"""Where vLLM hands answers back as prompts, refused: they would run as prefill.

    beam search        every step submits a prompt and its beam so far as the prompt of a new request of one token:
                       log-probabilities off by up to 1 nat over 24 tokens
    streaming input    a session's answers join its prompt when the next piece of input comes
                       (`Scheduler._update_request_as_session`): their KV stays, until a preemption computes it again

Nothing in such a request says where an answer began (vLLM 0.32). An engine whose two phases multiply alike is not
concerned. Everything else that vLLM computes again it computes under the request's own prompt length, which is exact
(docs/vllm.md).
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from mixquant.errors import InputError
from mixquant.integrations.vllm import METHOD

_HOMES = ("vllm.entrypoints.llm", "vllm.entrypoints.generate.beam_search.online")
"""Modules whose classes search by beams, in this process and behind a server; older versions keep both elsewhere."""

_SENTENCE = (
    "vLLM's {} hands answers back as prompts, which would run them in the prefill format: {}, or serve the model "
    "without --quantization mixquant."
)
_BEAMS = _SENTENCE.format("beam search", "ask for samples (n) instead")
_STREAMS = _SENTENCE.format("streaming input", "send each prompt as a request of its own")


def install() -> None:
    """Wrap the methods concerned: `beam_search` of all classes of vLLM's entry points that are loaded, and the front's
    `generate`. Calling it again changes nothing."""
    from vllm.v1.engine.async_llm import AsyncLLM

    _wrap(AsyncLLM, "generate", _streams)
    for home in _HOMES:
        with suppress(ImportError):  # another version: what is loaded is found below
            importlib.import_module(home)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.entrypoints"):
            for found in list(vars(module).values()):
                if isinstance(found, type):
                    _wrap(found, "beam_search", lambda *_, **__: _BEAMS)


def _streams(prompt: Any, *_: Any, **__: Any) -> str | None:
    """The sentence for a prompt that comes piece by piece."""
    return _STREAMS if isinstance(prompt, AsyncGenerator) else None


def _wrap(owner: Any, name: str, reason: Callable[..., str | None]) -> None:
    """Let a method raise InputError with the sentence that `reason` gives for its arguments, in engines of ours."""
    original = vars(owner).get(name)
    if original is None or getattr(original, METHOD, False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (sentence := reason(*args, **kwargs)) and _differs(self):
            raise InputError(sentence)
        return original(self, *args, **kwargs)

    setattr(method, METHOD, True)
    setattr(owner, name, method)


def _differs(owner: Any) -> bool:
    """Whether an engine of ours, or the engine behind an entry point, runs its two phases in different formats."""
    engine = getattr(owner, "llm_engine", None) or getattr(owner, "engine_client", owner)
    policy = getattr(engine.vllm_config.quant_config, "policy", None)
    return policy is not None and policy.held.prefill != policy.held.decode
