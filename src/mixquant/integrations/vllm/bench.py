"""Benchmarked engines: stock vLLM and vLLM with the plugin, several in one run, each in processes of its own.

They start side by side, under vLLM's own defaults for servers but for

    longest context     that of the longest workload
    KV cache            as large as the longest workload needs: of engines that start together none can measure what is
                        left
    prefix caching      on
    eager on CPUs       compiling takes longer than it saves

and then wait for requests: token ids in, token ids out, no tokenizer. What an engine tells of itself, and the switch of
its tail, are methods of its workers (`Bench`, which vLLM mixes into its own worker class).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mixquant.bench.arms import EngineSpec
from mixquant.bench.memory import Sizes
from mixquant.bench.play import Output, Sample, play
from mixquant.bench.runner import Running
from mixquant.bench.workloads import Case, Tokens
from mixquant.checkpoint.locate import Found
from mixquant.errors import InputError
from mixquant.integrations.vllm import METHOD, rates, register
from mixquant.integrations.vllm.engine import unwrapped
from mixquant.integrations.vllm.overheard import causes, overheard

REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Environment of this process and its engines; a user's own values of the second stay."""


@dataclass(frozen=True, kw_only=True)
class VllmBackend:
    """found: MODEL. window: tokens of the longest request. total: bytes of the device's memory. lengths: of prompts
    whose attention is measured for the ceilings. load_format: vLLM's own, such as `dummy`."""

    found: Found
    window: int
    sizes: Sizes
    total: int
    lengths: Sequence[int]
    vocabulary: int
    load_format: str = "auto"
    name: str = "vllm"

    def start(self, specs: Sequence[EngineSpec]) -> dict[EngineSpec, Running | str]:
        """Engines that are resident together, each running, or why it does not start."""
        os.environ.update(REQUIRED | {name: os.environ.get(name, value) for name, value in QUIET.items()})
        register()  # where mixquant runs from a checkout, no entry point does it
        configs = {spec: self._configured(spec) for spec in specs}  # one by one: vLLM's are no work for threads
        with overheard() as said, ThreadPoolExecutor(len(specs)) as pool:
            outcomes = list(pool.map(self._started, configs.values()))
        started: dict[EngineSpec, Running | str] = {
            spec: _with_cause(found, said) if isinstance(found, str) else found
            for spec, found in zip(specs, outcomes, strict=True)
        }
        running = [engine for engine in started.values() if isinstance(engine, VllmRunning)]
        known = running[0].rates(self.lengths) if running else {}
        for engine in running:
            engine.facts |= known
        return started

    def _configured(self, spec: EngineSpec) -> Any:
        """vLLM's configuration of an engine, or why there is none."""
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext

        try:
            arguments = EngineArgs(model=self.found.decode, revision=self.found.revision, **self._options(spec))
            return arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        except Exception as error:  # of vLLM, its plugins, torch, the hub
            return _reason(error)

    def _options(self, spec: EngineSpec) -> dict[str, Any]:
        options: dict[str, Any] = {
            "skip_tokenizer_init": True, "enable_prefix_caching": True, "seed": 0, "load_format": self.load_format,
            "max_model_len": self.window, "kv_cache_memory_bytes": self.sizes.cache, "use_tqdm_on_load": False,
            "worker_extension_cls": f"{__name__}.Bench", "disable_log_stats": True,
        }  # fmt: skip
        if self.sizes.device == "cpu":
            options["enforce_eager"] = True
        else:  # only what vLLM checks before it begins: that so much is free
            options["gpu_memory_utilization"] = min(self.sizes.engine(spec) / self.total, 0.95)
        if spec.method:
            options["quantization"] = spec.method
        if spec.policy is not None:
            own = self.found.quantized_as(spec.policy)
            folder = spec.weights or (str(own.path) if own else None)
            method = {"quant_method": METHOD, "prefill_weights": folder, **spec.policy.to_dict()}
            del method["tail"]  # arms set their own; the others have the engine's default
            options["hf_overrides"] = {"quantization_config": method}
        return options

    def _started(self, config: Any) -> VllmRunning | str:
        if isinstance(config, str):
            return config
        from vllm.v1.engine.llm_engine import LLMEngine

        begin = time.perf_counter()
        try:
            engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
            return VllmRunning(engine, self.vocabulary, time.perf_counter() - begin)
        except Exception as error:
            return _reason(error)


class VllmRunning:
    """One engine that waits for requests."""

    def __init__(self, engine: Any, vocabulary: int, seconds: float) -> None:
        self.engine, self.vocabulary = engine, vocabulary
        self.facts: dict[str, Any] = engine.collective_rpc("mixquant_facts")[0] | {"start_s": round(seconds, 1)}
        self._requests = 0

    def submit(self, ids: Tokens, answer: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._requests += 1
        name = str(self._requests)
        sampling = SamplingParams(
            temperature=0, max_tokens=answer, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        self.engine.add_request(name, {"prompt_token_ids": ids}, sampling)
        return name

    def step(self) -> list[Output]:
        return [
            Output(out.request_id, list(out.outputs[0].token_ids), out.finished, out.num_cached_tokens or 0)
            for out in self.engine.step()
        ]

    def turn(self, case: Case, seed: object, short: bool = False) -> Sample:
        return play(case, self, seed, short)

    def forget(self) -> None:
        self.engine.reset_prefix_cache()

    def switch(self, tail: int | None) -> None:
        self.engine.collective_rpc("mixquant_set_tail", args=(tail,))

    def rates(self, lengths: Sequence[int]) -> dict[str, Any]:
        """The model's shape and the device's rates, for ceilings; empty where they are not known, and why."""
        try:
            return dict(self.engine.collective_rpc("mixquant_rates", args=(list(lengths),))[0])
        except Exception as error:  # of a device whose parts cannot be timed: the figures stand without a ceiling
            return {"no_ceiling": _reason(error)}

    def close(self) -> None:
        self.engine.engine_core.shutdown()


class Bench:
    """What the workers of a benchmarked engine can do besides. Values are plain: they cross processes."""

    def mixquant_set_tail(self, tail: int | None) -> None:
        method = self.model_runner.vllm_config.quant_config  # type: ignore[attr-defined]
        method.state.tail = method.policy.held.tail if tail is None else tail

    def mixquant_facts(self) -> dict[str, Any]:
        """Which kernels run, under which graphs, by which attention, in how much memory."""
        return facts(self.model_runner)  # type: ignore[attr-defined]

    def mixquant_rates(self, lengths: list[int]) -> dict[str, Any]:
        return rates.as_facts(self.model_runner, lengths)  # type: ignore[attr-defined]


def facts(runner: Any) -> dict[str, Any]:
    """What is known of an engine, as JSON values."""
    import vllm

    config, method = runner.vllm_config, runner.vllm_config.quant_config
    kernels, emulated = _kernels(runner)
    backends = {
        layer.attn_backend.get_name()
        for layer in config.compilation_config.static_forward_context.values()
        if hasattr(layer, "attn_backend")
    }
    blocks, size = config.cache_config.num_gpu_blocks, config.cache_config.block_size
    scheduler = config.scheduler_config
    return {
        "kernels": kernels,
        "emulated": emulated,
        "vllm": vllm.__version__,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "largest_graph": config.compilation_config.max_cudagraph_capture_size,
        "attention": sorted(backends),
        "min_prompt": method.state.short.min_prompt if hasattr(method, "startup") else 0,
        "tail": method.policy.held.tail if hasattr(method, "startup") else None,
        "runner": "V2" if type(runner).__module__.startswith("vllm.v1.worker.gpu.") else "V1",
        "model_bytes": getattr(runner, "model_memory_usage", None),
        "cache_tokens": blocks * size if blocks and size else None,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "max_num_seqs": scheduler.max_num_seqs,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
    }


def _kernels(runner: Any) -> tuple[dict[str, list[str]], bool]:
    """Kernels by phase, and whether one is emulated: the plugin's own answer, or what stock vLLM's layers hold."""
    method = runner.vllm_config.quant_config
    if hasattr(method, "startup"):
        from mixquant.integrations.vllm.announce import DTYPES

        plain = f"vllm.{DTYPES[runner.vllm_config.model_config.dtype].lower()}"
        found = {phase: method.startup.kernels(phase, plain) for phase in ("prefill", "decode")}
        emulated = any(emulated for names in found.values() for _, emulated in names)
        return {phase: sorted(name for name, _ in names) for phase, names in found.items()}, emulated
    names = sorted({name for module in runner.get_model().modules() if (name := _stock_kernel(module))})
    return {"prefill": names, "decode": names}, any("Emulation" in name for name in names)


def _stock_kernel(module: Any) -> str | None:
    """What a layer of stock vLLM multiplies by, as its own classes say."""
    method = getattr(module, "quant_method", None)
    if method is None or "Embedding" in type(method).__name__:
        return None
    holder = getattr(module, "scheme", method)
    if "KVCache" in type(holder).__name__:  # it multiplies nothing
        return None
    kernel = getattr(holder, "kernel", None) or getattr(holder, "fp8_linear", None)
    return f"vllm.{type(holder).__name__}" + (f".{type(kernel).__name__}" if kernel is not None else "")


def _with_cause(reason: str, said: Sequence[str]) -> str:
    """vLLM's own reason, or where that is only that a process has failed, what the processes said."""
    found = [cause.split(". ")[0] for cause in causes(said)] if "root cause" in reason else []
    return f"vLLM: {'; or '.join(found)}" if found else reason


def _reason(error: Exception) -> str:
    """Why an engine does not start, in a line."""
    cause = unwrapped(error)
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[0] if isinstance(cause, InputError) else f"vLLM: {lines[0]}"
