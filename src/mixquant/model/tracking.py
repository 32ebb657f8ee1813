"""Where the prompt ends: from the calls that a causal language model gets to the plan of each forward.

What. A batch is [sequences, columns]; a token's column is the number of KV-cache entries before it. Left padding takes
columns like tokens do, so all sequences of a generate call share one prompt length: the columns of its input.

    model.generate(...)          the prompt is what generate was given; everything after it is decode
    with prompt_length(model, n) the prompt is the first n columns (teacher-forced scoring; one n per sequence allowed)
    model(...) alone             the tokens of this call are the end of a prompt: all prefill but the last `tail`

So a hand-written loop (one forward for the prompt, then one per token) is phase-correct without a word: a call of no
more tokens than the tail is decode. With tail=0, and for a prompt in several calls, its length must be declared.

How. A forward pre-hook on the decoder makes the plan, a forward hook drops it. Within generate the plan is made where
Transformers prepares each step's inputs, which is never compiled; once a cached prompt is consumed, the plan is
DECODE_ONLY without a look at the cache (whose length may live on the device). So is that of a call alone with no more
tokens than the tail. A forward within generate that nobody prepared (the negative prompt of classifier-free guidance)
counts as a call of its own.
Trade-off. The plan is taken from the outside, by hooks and wrapped methods: any Transformers model works without a line
changed, but what its calls do not say cannot be known. A model that hides how many tokens it has seen is refused.
Threads. generate calls of one model take turns. A plain forward from another thread during a generate would use that
call's plan: do not mix the two on one model.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixquant.errors import InputError
from mixquant.model.linear import PhaseState
from mixquant.phase import DECODE_ONLY, plan

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What models call their KV cache: Transformers 5.24 renamed the argument, and takes the old name until 5.40."""

UNCOUNTED = "The model keeps its past where mixquant cannot count it: choose one with a KV cache."


@dataclass
class _Call:
    """What is known of the call that runs now: a generate, a declared prompt length, or neither."""

    prompt: int | list[int] | None = None  # declared columns of the prompt
    generating: bool = False
    started: bool = False  # generate has prepared a step
    consumed: bool = False  # generate's prompt is behind: every further step is decode


class PromptTracker:
    """Makes the plan of each forward of one model; installed by `convert_`."""

    def __init__(self, model: nn.Module, decoder: nn.Module, state: PhaseState, tail: int) -> None:
        self.state = state
        self.tail = tail
        self.call = _Call()
        self.lock = threading.RLock()  # one generate at a time: the plan belongs to the model
        decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        decoder.register_forward_hook(self._after_forward, always_call=True)
        if hasattr(model, "generate"):
            wrap_method(model, "generate", self._generate)
            wrap_method(model, "prepare_inputs_for_generation", self._prepare)
        for name in ("generate_batch", "init_continuous_batching"):
            if hasattr(model, name):
                wrap_method(model, name, _refuse_packed)

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptTracker:
        """A copied model gets its own tracker; locks cannot be copied."""
        other = memo[id(self)] = object.__new__(PromptTracker)
        other.__dict__ = {name: copy.deepcopy(v, memo) for name, v in self.__dict__.items() if name != "lock"}
        other.lock = threading.RLock()
        return other

    @contextmanager
    def declare(self, prompt: int | list[int] | None, generating: bool = False) -> Iterator[None]:
        """Set the prompt's length for the calls inside; nests."""
        with self.lock:
            before = self.call, self.state.plan
            self.call, self.state.plan = _Call(prompt, generating), None
            try:
                yield
            finally:
                self.call, self.state.plan = before

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.declare(_generate_columns(*args, **kwargs), generating=True):
            return original(*args, **kwargs)

    def _prepare(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = original(*args, **kwargs)
        if self.call.generating and not self.call.consumed:  # consumed: a decode step must not even ask the cache
            self._plan(inputs, self.call.prompt)
            self.call.started = True
            self.call.consumed = self.state.plan is DECODE_ONLY
        return inputs

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.call.generating and self.state.plan is not None:
            return
        prompt = None if self.call.generating else self.call.prompt  # in generate: nobody prepared it
        inputs = {"input_ids": args[0] if args else None, **kwargs}
        if prompt is None and _token_shape(inputs)[1] <= self.tail:  # the cache is not asked: one graph, no wait
            self.state.plan = DECODE_ONLY
        else:
            self._plan(inputs, prompt)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.call.consumed:  # else DECODE_ONLY holds until generate ends, and nobody plans again
            self.state.plan = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _plan(self, inputs: dict[str, Any], prompt: int | list[int] | None) -> None:
        """From a forward's inputs to the plan; without a prompt's length, their tokens are the end of a prompt."""
        sequences, scheduled = _token_shape(inputs)
        cache = _cache(inputs)
        computed = _tokens_in(cache)
        prompt = computed + scheduled if prompt is None else prompt
        prompts = [prompt] * sequences if isinstance(prompt, int) else prompt
        if len(prompts) != sequences:
            raise InputError(
                f"{len(prompts)} prompt lengths for a batch of {sequences}: give one, or one per sequence."
            )
        # A second step whose cache is empty and which does not repeat the prompt: the past is kept somewhere else.
        if self.call.started and prompt == self.call.prompt and computed == 0 and scheduled < max(prompts):
            raise InputError(UNCOUNTED)
        finished = cache is not None and computed >= max(prompts) - self.tail
        steps = [computed] * sequences, [scheduled] * sequences
        self.state.plan = DECODE_ONLY if finished else plan(prompts, *steps, self.tail)


@contextmanager
def prompt_length(model: nn.Module, columns: int | Sequence[int] | Tensor) -> Iterator[None]:
    """Declare where the prompt ends for the forwards inside, in columns; one number, or one per sequence.

    Scoring an answer needs it: a forward over prompt and answer then runs the answer as decode. Raises InputError if
    the model was not converted by mixquant.

    >>> import mixquant, torch
    >>> from transformers import AutoModelForCausalLM
    >>> model = mixquant.convert_(AutoModelForCausalLM.from_pretrained(mixquant.DEMO), "fp8,tail=1")
    >>> tokens = torch.arange(1, 9).unsqueeze(0)  # a prompt of five, an answer of three
    >>> with mixquant.prompt_length(model, 5):
    ...     decoded = model(tokens).logits
    >>> read = model(tokens).logits  # not said: all but the last token are read as prompt
    >>> torch.equal(decoded[:, :4], read[:, :4]), torch.equal(decoded[:, 4:], read[:, 4:])
    (True, False)
    """
    tracker: PromptTracker | None = getattr(model, "mixquant_tracker", None)
    if tracker is None:
        raise InputError("prompt_length needs a converted model: call mixquant.convert_(model, policy) first.")
    lengths = [int(n) for n in torch.as_tensor(columns).flatten()]
    if min(lengths) < 0:
        raise InputError(f"A prompt has 0 or more columns, not {min(lengths)}.")
    with tracker.declare(lengths[0] if len(lengths) == 1 else lengths):
        yield


def wrap_method(model: nn.Module, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, *args, **kwargs)` in the place of a model's bound method."""
    original = getattr(model, name)
    setattr(model, name, functools.wraps(original)(functools.partial(around, original)))


def _refuse_packed(original: Callable[..., Any], *_: Any, **__: Any) -> Any:
    raise InputError(
        "Continuous batching packs sequences into one row: use generate, or vLLM with the mixquant plugin."
    )


def _generate_columns(inputs: Tensor | None = None, *_: Any, **kwargs: Any) -> int:
    """Columns of generate's input. With a kept cache the attention mask covers old and new tokens."""
    mask, cache = kwargs.get("attention_mask"), _cache(kwargs)
    if kwargs.get("guidance_scale") is not None and kwargs.get("use_cache") is False:
        raise InputError("guidance_scale without a cache hides where the prompt ends: leave use_cache on.")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return int(mask.shape[1])
    for value in (kwargs.get("inputs_embeds"), inputs, kwargs.get("input_ids")):
        if value is not None:
            columns = int(value.shape[1])
            if mask is None and _tokens_in(cache) >= columns:  # too few to repeat what is cached
                raise InputError("generate got a kept cache and only new tokens: pass attention_mask over both.")
            return columns
    return 1  # generate starts from the BOS token


def cache_argument(model: nn.Module) -> str:
    """What this model's forward calls its KV cache."""
    inputs = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_ARGUMENTS if name in inputs)


def _cache(inputs: Mapping[str, Any]) -> Any:
    """The KV cache among a call's keyword arguments, or None."""
    return next((inputs[name] for name in CACHE_ARGUMENTS if inputs.get(name) is not None), None)


def _tokens_in(cache: Any) -> int:
    """Tokens of each sequence that a KV cache holds; InputError for a recurrent state, which does not count them."""
    if cache is None:
        return 0
    try:
        return int(cache.get_seq_length())
    except (AttributeError, ValueError):
        raise InputError(UNCOUNTED) from None


def _token_shape(inputs: dict[str, Any]) -> tuple[int, int]:
    """(sequences, columns) of a forward's tokens."""
    for name in ("input_ids", "inputs_embeds"):
        value = inputs.get(name)
        if isinstance(value, Tensor):
            return int(value.shape[0]), int(value.shape[1])
    raise InputError("The forward has neither input_ids nor inputs_embeds: mixquant cannot count its tokens.")
