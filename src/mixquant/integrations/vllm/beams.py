"""Beam search, refused: vLLM hands each beam back as a new prompt, and its answer would run as prefill.

For every step vLLM (0.32) submits a prompt and its beam so far as the prompt of a new request of one token. Nothing in
that request says where the answer began, so generated tokens would go through the quantized layers: log-probabilities
off by up to 1 nat over 24 tokens. An engine whose two phases multiply alike is not concerned.
"""

from __future__ import annotations

import functools
import importlib
import sys
from contextlib import suppress
from typing import Any

from mixquant.errors import InputError
from mixquant.integrations.vllm import METHOD

_HOMES = ("vllm.entrypoints.llm", "vllm.entrypoints.generate.beam_search.online")
"""Modules whose classes search by beams, in this process and behind a server; older versions keep both elsewhere."""

_SENTENCE = (
    "vLLM's beam search hands answers back as prompts, which would run them in the prefill format: ask for samples (n) "
    "instead, or serve the model without --quantization mixquant."
)


def install() -> None:
    """Wrap `beam_search` of all classes of vLLM's entry points that are loaded; calling it again changes nothing."""
    for home in _HOMES:
        with suppress(ImportError):  # another version: what is loaded is found below
            importlib.import_module(home)
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.entrypoints"):
            for found in list(vars(module).values()):
                if isinstance(found, type) and "beam_search" in vars(found):
                    _wrap(found)


def _wrap(owner: Any) -> None:
    original = owner.beam_search
    if getattr(original, METHOD, False):
        return

    @functools.wraps(original)
    def beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check(getattr(self, "llm_engine", None) or self.engine_client)
        return original(self, *args, **kwargs)

    setattr(beam_search, METHOD, True)
    owner.beam_search = beam_search


def _check(engine: Any) -> None:
    """Raise InputError where an engine of ours runs its two phases in different formats."""
    policy = getattr(engine.vllm_config.quant_config, "policy", None)
    if policy is not None and policy.prefill != policy.decode:
        raise InputError(_SENTENCE)
