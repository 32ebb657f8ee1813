"""The evaluator's backend on vLLM: every arm is a real engine in this process, one after another.

    bf16, bf16-control       stock vLLM: the reference is what people serve without us
    all others               the same with the plugin, under the arm's policy

All arms have the same options: vLLM's own defaults, with torch.compile and CUDA graphs on GPUs, except

    V1 runner        the V2 runner takes no logits processors (vLLM 0.26), or others than V1 (0.32); phases and kernels
                     are the same on both (docs/vllm-tests.md)
    in process       logits are taken where they are computed, and a row of 150,000 floats a token crosses no socket
    no prefix cache  a cached block keeps the precision of the phase that made it, so that an answer would depend on
                     the examples before it
    no step ahead    asynchronous scheduling would begin a step before the logits of the one before are kept
    eager on CPUs    compiling takes longer than it saves

A control is its arm in another batch composition: prompts come in reverse order and in two halves, so that
products run over other numbers of rows, and in chunks of other lengths. What then differs is the noise floor; on CPUs
most answers are equal to the bit. Token ids go in and come out; vLLM loads no tokenizer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixquant import policy as policies
from mixquant.checkpoint.locate import Found
from mixquant.devices import device_name
from mixquant.errors import InputError
from mixquant.evaluate.arms import Arm, standard
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.integrations.vllm import METHOD
from mixquant.integrations.vllm.cpu import cache_bytes
from mixquant.packages import require

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTROL_OPTIONS = {"max_num_batched_tokens": 1999}
"""A prime, so that prompts are cut where no block of the KV cache or tile of a kernel ends; vLLM asks for no less than
its max_num_seqs, which is up to 1,024."""

REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Environment of this process; vLLM reads the second when it is imported, and a user's own values stay."""


class VllmBackend:
    """A model in vLLM.

    found: a BF16 model, or a folder of `mixquant quantize` with its BF16 model. format: the quantized format
    of the arms. tokenizer: its end-of-turn token ends answers, as do those of the model's generation_config.json.
    asked: arms by name; those that have names of their own need not be among them.
    options: vLLM's own (`vllm.LLM`), such as max_model_len, the same for all arms. InputError where vLLM is missing.
    """

    name = "vllm"
    together = False
    forces = True

    def __init__(
        self,
        found: Found,
        format: str,
        tokenizer: PreTrainedTokenizerBase,
        asked: Mapping[str, Arm] | None = None,
        **options: Any,
    ) -> None:
        require("vllm")
        policies.arm("phase", format)
        self.model, self.revision = found.decode, found.revision
        self.prefill_weights = None if found.quantized is None else str(found.quantized.path)
        self.format, self.asked = format, asked or {}
        self.end_ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        os.environ.update(REQUIRED | {name: os.environ.get(name, value) for name, value in QUIET.items()})
        from vllm.platforms import current_platform

        self._device = torch.device(current_platform.device_type)
        self.device = device_name(self._device)
        self.options = _defaults(self._device) | options

    def open(self, arm: str) -> VllmEngine:
        """Start an arm's engine; the one before must be closed. InputError where vLLM or the plugin refuses."""
        found = self.asked.get(arm) or standard(arm, self.format)
        options = self.options | {"revision": self.revision} | (CONTROL_OPTIONS if found.of else {})
        if any(found.quantizes):
            own = self.prefill_weights if self.format in (found.policy.prefill, found.policy.decode) else None
            # An evaluation asks what quantizing a prompt costs, however short it is, and the same on every device: no
            # prompt is precise unless an arm asks for it.
            policy = replace(found.policy, min_prompt=found.policy.min_prompt or 0)
            method = {
                "quant_method": METHOD,
                "prefill_weights": found.weights or own,
                **policy.to_dict(),
            }
            options["hf_overrides"] = {"quantization_config": method}
        return VllmEngine(_start(self.model, arm, options), self.end_ids, in_halves=found.of is not None)


class VllmEngine:
    """One running engine; `llm` is vLLM's own handle."""

    def __init__(self, llm: Any, end_ids: TokenIds, in_halves: bool) -> None:
        self.llm = llm
        self.end_ids = end_ids
        self.in_halves = in_halves
        found = {phase: _kernels(llm, phase) for phase in ("prefill", "decode")}
        self.kernels = {phase: sorted(name for name, _ in kernels) for phase, kernels in found.items()}
        self.emulated = any(emulated for kernels in found.values() for _, emulated in kernels)

    def generate(self, queries: Sequence[Query], drafts: Sequence[TokenIds] | None = None) -> list[TokenIds]:
        """As `Engine.generate`; drafts are not used."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0.0, max_tokens=query.limit, stop_token_ids=self.end_ids, detokenize=False)
            for query in queries
        ]
        return self._write(queries, params)

    def score(self, queries: Sequence[Query], answers: Sequence[TokenIds]) -> list[Tensor]:
        """As `Engine.score`: float32 [answer length, vocabulary] on the CPU."""
        from mixquant.integrations.vllm.forcing import ForcedAnswer

        forced = [ForcedAnswer(answer) for answer in answers]
        if self._write(queries, [answer.params() for answer in forced]) != [list(answer) for answer in answers]:
            raise InputError("vLLM wrote other tokens than were forced: report this vLLM version to mixquant.")
        return [answer.logits for answer in forced]

    def close(self) -> None:
        """Free the engine's memory, so that another can start in this process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        cleanup_dist_env_and_memory()

    def _write(self, queries: Sequence[Query], params: Sequence[Any]) -> list[TokenIds]:
        """What vLLM writes to each query, in their order."""
        self._check_length(queries, params)
        written: dict[int, TokenIds] = {}
        for places in self._batches(len(queries)):
            prompts = [{"prompt_token_ids": queries[place].ids} for place in places]
            outputs = self.llm.generate(prompts, [params[place] for place in places], use_tqdm=False)
            written |= {place: list(output.outputs[0].token_ids) for place, output in zip(places, outputs, strict=True)}
        return [written[place] for place in range(len(queries))]

    def _batches(self, count: int) -> Iterator[range]:
        """Places of the requests that run together, in the order in which they are sent."""
        middle = count // 2 if self.in_halves else 0
        halves = (range(middle, count), range(middle))
        return (places[::-1] if self.in_halves else places for places in halves if places)

    def _check_length(self, queries: Sequence[Query], params: Sequence[Any]) -> None:
        """vLLM would cut an answer at the end of its context without a word."""
        window = self.llm.llm_engine.model_config.max_model_len
        for query, param in zip(queries, params, strict=True):
            if len(query.ids) + param.max_tokens > window:
                raise InputError(
                    f"{len(query.ids)} prompt tokens and up to {param.max_tokens} new ones exceed vLLM's context of "
                    f"{window}: leave out this example, or raise max_model_len."
                )


def _defaults(device: torch.device) -> dict[str, Any]:
    options: dict[str, Any] = {
        "skip_tokenizer_init": True, "enable_prefix_caching": False, "async_scheduling": False,
        "use_tqdm_on_load": False,
    }  # fmt: skip
    if device.type == "cpu":
        options["enforce_eager"] = True
        if size := cache_bytes():
            options["kv_cache_memory_bytes"] = size
    return options


def _start(model: str, arm: str, options: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    from mixquant.integrations.vllm.forcing import AnswerForcing

    try:
        return LLM(model, logits_processors=[AnswerForcing], **options)
    except Exception as error:  # of vLLM, its plugins, torch, the hub
        cleanup_dist_env_and_memory()  # what fails midway would leave its process groups to the next engine
        cause = unwrapped(error)
        if isinstance(cause, InputError):
            raise cause from None
        said = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise InputError(
            f"vLLM cannot start {model} in the arm {arm} ({said.rstrip('.')}): choose a model and options that it "
            "serves, or --engine transformers."
        ) from error


def unwrapped(error: Exception) -> Exception:
    """What was raised while vLLM's configuration was built, where pydantic has put it into an error of its own."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return error
    cause = error.errors()[0].get("ctx", {}).get("error")
    return cause if isinstance(cause, Exception) else error


def _kernels(llm: Any, phase: str) -> set[tuple[str, bool]]:
    """(name, whether it is emulated) of the kernels of the routed linear layers in a phase."""
    from mixquant.integrations.vllm.announce import DTYPES

    config = llm.llm_engine.vllm_config
    plain = f"vllm.{DTYPES[config.model_config.dtype].lower()}"
    if config.quant_config is None:
        return {(plain, False)}
    return set(config.quant_config.startup.kernels(phase, plain))
