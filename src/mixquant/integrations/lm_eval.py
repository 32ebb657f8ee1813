"""A model of lm-eval that runs in an arm: all of lm-eval's tasks, and its command line unchanged.

    mixquant lm-eval --model mixquant --model_args pretrained=demo,prefill=nvfp4,arm=phase --tasks gsm8k

What a request exercises:

    generate_until         the prompt is prefill, the answer decode
    loglikelihood          the context is prefill, the continuation decode, as it would be if the model wrote it
    loglikelihood_rolling  a text is read, none is written: all of it is prefill

So only generative tasks show what quantized decoding costs: the choices of a multiple-choice task are a few tokens
long. A perplexity is exactly `uniform`'s in `phase`, and `bf16`'s in `decode-only`; it is refused in these two, so that
no column is printed twice under two names.

Answers are greedy. The engine knows no stop strings: it writes to the end of the turn or to the limit, and the text is
cut at the first stop string afterwards, which costs time and changes nothing. Prompts that are too long lose their
beginning, as in lm-eval's own models, with a warning.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from mixquant.checkpoint.locate import find
from mixquant.devices import parse_device
from mixquant.errors import InputError
from mixquant.evaluate.engine import Engine, Query, TokenIds
from mixquant.integrations.transformers.loading import context_window, load_config, load_tokenizer
from mixquant.model.arms import quantizes
from mixquant.policy import choose_name
from mixquant.prompts import NO_TEMPLATE, Chat, render

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_HARMLESS = ("do_sample", "temperature", "top_p", "top_k", "min_p")  # to a greedy answer
_DEFAULT_LIMIT = 256  # lm-eval's own

Pair = tuple[Any, TokenIds, TokenIds]
Result = TypeVar("Result")

log = logging.getLogger(__name__)


@register_model("mixquant")
class MixQuantLM(TemplateLM):  # type: ignore[misc]
    """One engine in one arm, as lm-eval wants it."""

    def __init__(
        self, engine: Engine, arm: str, tokenizer: PreTrainedTokenizerBase, window: int, batch_size: int = 1
    ) -> None:
        """window: the model's context window in tokens. batch_size: requests that run together."""
        super().__init__()
        self.engine = engine
        self.arm = arm
        self.tokenizer = tokenizer
        self.max_length = window
        self.batch_size = batch_size

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> MixQuantLM:
        """From --model_args, and below them what lm-eval adds; None stands for an option that was not given."""
        given = {key: value for key, value in {**(additional_config or {}), **arg_dict}.items() if value is not None}
        known = ("pretrained", "prefill", "arm", "device", "batch_size")
        for key in given:
            choose_name("model argument", key, known)
        if "pretrained" not in given:
            raise InputError("No model is named: give --model_args pretrained=demo, a folder or a hub id.")
        return cls._open(**given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> MixQuantLM:
        """The same from "pretrained=demo,arm=phase"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def _open(
        cls, pretrained: str, prefill: str = "auto", arm: str = "phase", device: str | None = None, batch_size: Any = 1
    ) -> MixQuantLM:
        from mixquant.integrations.transformers.engine import TransformersBackend

        quantizes(arm)  # refuses an unknown one before anything loads
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise InputError(f"batch_size is a number of requests, not {batch_size!r}: give --batch_size 8.")
        found = find(pretrained)
        tokenizer = load_tokenizer(found)
        window = context_window(load_config(found))
        if window is None:
            raise InputError(f"{pretrained} states no context window in its config.json: add max_position_embeddings.")
        engine = TransformersBackend.load(found, prefill, _device(device)).open(arm)
        return cls(engine, arm, tokenizer, window, int(batch_size))

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What lm-eval writes into its results file; where it asks for a template, before any prompt is made."""
        if chat_template and self.tokenizer.chat_template is None:
            raise InputError(NO_TEMPLATE)
        found: str | None = super().chat_template(chat_template)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        continues = not add_generation_prompt
        return render(self.tokenizer, Chat(chat_history), "A task", add_generation_prompt, continues)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> TokenIds:
        """Token ids; by default with the tokenizer's special tokens, unless the text brings its own start."""
        if add_special_tokens is None:
            start = self.tokenizer.bos_token
            add_special_tokens = start is None or not string.startswith(start)
        ids: TokenIds = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False).input_ids
        return ids

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results file about the model."""
        return {"arm": self.arm, "kernels": self.engine.kernels, "emulated": self.engine.emulated}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        jobs = [self._query(*request.args) for request in requests]

        def run(batch: list[int]) -> list[str]:
            answers = self.engine.generate([jobs[i] for i in batch])
            texts = [cut(self.tokenizer.decode(ids, skip_special_tokens=True), stops(requests[i].args[1]))
                     for i, ids in zip(batch, answers, strict=True)]  # fmt: skip
            for i, text in zip(batch, texts, strict=True):
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
            return texts

        return self._in_batches([len(job.ids) for job in jobs], run, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        prefill, decode = quantizes(self.arm)
        if prefill != decode:
            same = "uniform" if prefill else "bf16"
            raise InputError(
                f"The perplexity of a text is pure prefill, in arm={self.arm} the same as in arm={same}: "
                f"say arm={same}, or choose tasks that generate."
            )
        totals = []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm or None):
            tokens = self.tok_encode(text)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length - 1, context_len=1)
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        jobs = [Query("", self._last(context, len(answer)), len(answer)) for _, context, answer in requests]

        def run(batch: list[int]) -> list[tuple[float, bool]]:
            answers = [requests[i][2] for i in batch]
            found = self.engine.score([jobs[i] for i in batch], answers)
            values = [_likelihood(logits, answer) for logits, answer in zip(found, answers, strict=True)]
            for i, value in zip(batch, values, strict=True):
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], value)
            return values

        return self._in_batches([len(job.ids) + job.limit for job in jobs], run, disable_tqdm)

    def _query(self, context: str, arguments: Mapping[str, Any]) -> Query:
        limit = greedy(arguments, "add --gen_kwargs do_sample=false,temperature=0")
        return Query(context, self._last(self.tok_encode(context), limit) or [self.prefix_token_id], limit)

    def _last(self, context: TokenIds, answer: int) -> TokenIds:
        """A prompt's last tokens, as many as fit into the window with the answer."""
        room = self.max_length - answer
        if room < 1:
            raise InputError(
                f"An answer of up to {answer} tokens does not fit the context window of {self.max_length}: "
                "add --gen_kwargs max_gen_toks=256, or leave the task out."
            )
        if len(context) > room:
            log.warning("A prompt of %d tokens loses its beginning: %d fit.", len(context), room)
        return context[-room:]

    def _in_batches(
        self, lengths: Sequence[int], run: Callable[[list[int]], list[Result]], disable_tqdm: bool
    ) -> list[Result]:
        """Run batches of requests of like length, the longest first; results in the order of the requests."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        results: dict[int, Result] = {}
        with tqdm(total=len(order), disable=disable_tqdm or None) as bar:  # None: shown on a terminal only
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                results |= zip(batch, run(batch), strict=True)
                bar.update(len(batch))
        return [results[i] for i in range(len(lengths))]


def run(arguments: Sequence[str]) -> None:
    """lm-eval's command line, with `--model mixquant` known to it."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()


def _device(name: str | None) -> torch.device:
    """A device by name; lm-eval says cuda:0 where its user says nothing, and is not believed on a machine without."""
    if name == "cuda:0" and not torch.cuda.is_available():
        log.warning("There is no CUDA device here, which lm-eval assumes: running on the CPU.")
        name = None
    return parse_device(name)


def _likelihood(logits: torch.Tensor, answer: TokenIds) -> tuple[float, bool]:
    """Log-probability in nats of an answer, and whether it is the greedy one. logits: [answer length, vocabulary]."""
    tokens = torch.tensor(answer, device=logits.device)
    chosen = torch.log_softmax(logits.double(), -1).gather(-1, tokens[:, None])
    return float(chosen.sum()), bool((logits.argmax(-1) == tokens).all())


def greedy(arguments: Mapping[str, Any], remedy: str) -> int:
    """The longest answer, in tokens, that a task's generation arguments allow; InputError for what is not greedy."""
    for key in arguments:
        choose_name("generation argument", key, ("until", *_LIMITS, *_HARMLESS))
    if arguments.get("do_sample") or float(arguments.get("temperature") or 0) > 0:
        raise InputError(f"The task samples its answers: {remedy}.")
    return int(next((arguments[key] for key in _LIMITS if key in arguments), _DEFAULT_LIMIT))


def stops(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """A task's stop strings."""
    until = arguments.get("until") or ()
    return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]
