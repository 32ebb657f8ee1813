"""When does a pair pay? An FP8 prefill server and a BF16 decode server against two engines of each other kind.

    benchmarks/pair.sh OUT          # two GPUs of 139 GiB, joined by NVLink; a model of Qwen3-8B's shape, dummy weights

    pair            prefill server with FP8 weights alone on GPU 0, stock BF16 decode server on GPU 1, NIXL between them
    pair, nested    the same prefill server, and a decode server of nested weights
    2 x mixquant    an engine on each GPU: prompts in FP8, answers in BF16, nested weights, a pair's own tail
    2 x BF16        stock vLLM on each GPU

All engines start side by side and stay; one arm at a time gets requests, the same ones at the same moments. A pair is
asked as vLLM's router asks it: a prefill server for one token, then a decode server for the answer, with word of where
the KV is. An engine of two gets every second request. `gap` is the time between two tokens of one answer, over all
answers: the decode step with whatever disturbed it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.pair_engine import Answer, Engine
from benchmarks.pair_report import tables
from mixquant.commands.handover import WANTED

FORMAT = "fp8"
METHOD = {"quant_method": "mixquant", "prefill": FORMAT}
NESTED = {"hf_overrides": {"quantization_config": METHOD | {"storage": "nested", "tail": 1, "min_prompt": 0}}}
PREFILL = {"hf_overrides": {"quantization_config": METHOD | {"role": "prefill", "storage": "separate"}}}
ENGINES: dict[str, tuple[int, dict[str, Any], str | None]] = {
    "prefill": (0, PREFILL, "prefill"),
    "decode": (1, {}, "decode"),
    "nested-decode": (1, NESTED, "decode"),
    "mixquant-0": (0, NESTED, None),
    "mixquant-1": (1, NESTED, None),
    "bf16-0": (0, {}, None),
    "bf16-1": (1, {}, None),
}
"""Each engine's GPU, its options, and its role in a pair."""

ARMS = {
    "pair": ("prefill", "decode"),
    "pair, nested": ("prefill", "nested-decode"),
    "2 x mixquant": ("mixquant-0", "mixquant-1"),
    "2 x BF16": ("bf16-0", "bf16-1"),
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that come at random, so many a second, while some others write long answers."""

    prompt: int
    answer: int
    rate: float
    writing: int = 0

    def __str__(self) -> str:
        beside = f" beside {self.writing} long answers" if self.writing else ""
        return f"{self.prompt} + {self.answer} tokens, {self.rate:g}/s{beside}"


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured, and how vLLM is started for it."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    loads: tuple[Load, ...]
    seconds: float
    long: int
    rounds: int
    options: dict[str, Any]


SIZES = {
    "8b": Size(
        lengths=(2048, 8192, 32768),
        batches=(1, 16),
        loads=(
            Load(prompt=32768, answer=16, rate=0.7, writing=16),
            Load(prompt=8192, answer=256, rate=4),
            Load(prompt=2048, answer=512, rate=8),
        ),
        seconds=9,
        long=4000,
        rounds=4,
        options={
            "load_format": "dummy", "max_model_len": 33024, "max_num_batched_tokens": 8192, "max_num_seqs": 128,
            # Of engines that start at once none can measure what is left.
            "gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 12 << 30,
        },
    ),
    "demo": Size(
        lengths=(64, 600),
        batches=(1, 4),
        loads=(Load(prompt=900, answer=4, rate=0.5, writing=2), Load(prompt=200, answer=8, rate=1)),
        seconds=4,
        long=1000,
        rounds=1,
        options={
            "enforce_eager": True, "block_size": 32, "max_model_len": 2048, "max_num_batched_tokens": 512,
            "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 28,
            "distributed_executor_backend": "uni",
        },
    ),
}  # fmt: skip
prompts = itertools.count()


@dataclass(frozen=True)
class Timed:
    """A request's answer, and when its prompt had been read by another server (seconds)."""

    answer: Answer
    sent: float
    read: float | None

    @property
    def first(self) -> float:
        return self.answer.times[0] - self.sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--engines", default=",".join(ENGINES), help="those that are started")
    parser.add_argument("--block-size", type=int, help="tokens in a block of the KV cache; by default vLLM's")
    parser.add_argument("--start", type=float, default=200, help="seconds after which an engine has not started")
    parser.add_argument("--limit", type=float, default=290, help="seconds after which no further load begins")
    args = parser.parse_args()
    asyncio.run(Bench(args).run())


class Bench:
    """The engines that started, the arms that they make, and the rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.size = args, SIZES[args.size]
        self.begin = time.monotonic()
        self.engines: dict[str, Engine] = {}
        self.facts: dict[str, Any] = {"machine": machine(), "failed": {}, "ready_s": {}}
        self.rows: list[dict[str, Any]] = []

    async def run(self) -> None:
        engines = self._start()
        try:
            await asyncio.gather(*(self._ready(engine) for engine in engines))
            arms = {arm: pair for arm, pair in ARMS.items() if set(pair) <= set(self.engines)}
            for arm in arms:
                await self._try(self._warm, arm)
            await self._try(self._same)
            for length in self.size.lengths:
                for arm in arms:
                    await self._try(self._alone, arm, length)
            for batch, arm in itertools.product(self.size.batches, arms):
                await self._try(self._decode, arm, batch)
            for load, arm in itertools.product(self.size.loads, arms):
                if time.monotonic() - self.begin < self.args.limit and (arm != "pair, nested" or load.writing):
                    await self._try(self._load, arm, load)
        finally:
            self._save()
            print("\n".join(tables(self.facts, self.rows)), flush=True)
            for engine in engines:
                engine.end()

    def _start(self) -> list[Engine]:
        out = self.args.out
        out.mkdir(parents=True, exist_ok=True)
        model = write_model(out / "model") if self.args.size == "8b" else demo()
        common = {"model": model, "skip_tokenizer_init": True, "seed": 0, **self.size.options}
        if self.args.block_size:
            common["block_size"] = self.args.block_size
        engines = []
        for place, name in enumerate(self.args.engines.split(",")):
            gpu, options, role = ENGINES[name]
            environment = {
                "CUDA_VISIBLE_DEVICES": str(gpu),
                "VLLM_CACHE_ROOT": f"/tmp/mixquant-pair-{name}",  # several compile one graph at once
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(15600 + 100 * place),
                "VLLM_USE_FLASHINFER_SAMPLER": "0",
                "UCX_NET_DEVICES": "lo",
            } | ucx()
            pair = (role, FORMAT) if role else None
            engines.append(Engine.start(name, common | options, pair, environment, out / f"{name}.log"))
        return engines

    async def _ready(self, engine: Engine) -> None:
        try:
            self.facts["ready_s"][engine.name] = round(await engine.ready(self.begin + self.args.start), 1)
            self.engines[engine.name] = engine
            print(f"{engine.name} is ready", flush=True)
        except (RuntimeError, EOFError) as error:
            self._failed(engine.name, error)

    async def _try(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """One row; what fails is said, and the others go on."""
        try:
            await asyncio.wait_for(work(*args), 60)
        except Exception as error:
            self._failed(" ".join(map(str, (work.__name__, *args))), error)
        self._save()

    def _failed(self, what: str, error: BaseException) -> None:
        self.facts["failed"][what] = f"{type(error).__name__}: {error}"
        print(f"FAILED {what}: {self.facts['failed'][what]}", flush=True)

    def _save(self) -> None:
        out = self.args.out
        text = json.dumps({"facts": self.facts, "rows": self.rows}, indent=1)
        (out / "pair.json").write_text(text + "\n")
        (out / "pair.md").write_text("\n".join(tables(self.facts, self.rows)) + "\n")

    def _row(self, **row: Any) -> None:
        self.rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "all"}), flush=True)

    async def request(
        self, arm: str, number: int, ids: Sequence[int], new_tokens: int, stop: asyncio.Event | None = None
    ) -> Timed:
        """One request to an arm."""
        first, second = (self.engines[name] for name in ARMS[arm])
        sent = time.perf_counter()
        if not arm.startswith("pair"):
            return Timed(await (first, second)[number % 2].ask(ids, new_tokens, stop=stop), sent, None)
        read = await first.ask(ids, 1, dict(WANTED))
        answer = await second.ask(ids, new_tokens, read.kept, stop)
        return Timed(answer, sent, read.times[-1])

    async def _warm(self, arm: str) -> None:
        for length in self.size.lengths:
            await asyncio.gather(*(self.request(arm, number, fresh(length), 4) for number in range(2)))

    async def _same(self) -> None:
        """Whether a pair's tokens are those of one engine: how many of the first ones are equal."""
        for length in (65, 333) if self._has("2 x mixquant") else ():
            ids = fresh(length)
            found = {arm: (await self.request(arm, 0, ids, 8)).answer.tokens for arm in ARMS if self._has(arm)}
            one = found.pop("2 x mixquant")
            equal = {arm: leading(tokens, one) for arm, tokens in found.items()}
            self._row(kind="same", prompt=length, of=len(one), equal=equal)

    def _has(self, arm: str) -> bool:
        return set(ARMS[arm]) <= set(self.engines)

    async def _alone(self, arm: str, length: int) -> None:
        """First token of a lone request; of a pair, the parts."""
        before = await self._moved(arm)
        found = [await self.request(arm, turn, fresh(length), 4) for turn in range(self.size.rounds)]
        self._row(kind="alone", arm=arm, prompt=length, **parts(found), **await self._moved(arm, before))

    async def _moved(self, arm: str, before: dict[str, float] | None = None) -> dict[str, float]:
        """NIXL's own figures since `before`: mean time and size of a transfer."""
        if not arm.startswith("pair"):
            return {}
        now = await self.engines[ARMS[arm][1]].metrics()
        if before is None:
            return now
        since = {name: value - before.get(name, 0) for name, value in now.items()}
        count = since.get("vllm:nixl_xfer_time_seconds_count") or float("nan")
        return {
            "transfer_ms": 1e3 * since.get("vllm:nixl_xfer_time_seconds_sum", float("nan")) / count,
            "transfer_mb": since.get("vllm:nixl_bytes_transferred_sum", float("nan")) / count / 1e6,
        }

    async def _decode(self, arm: str, batch: int) -> None:
        """Decode step when nobody reads."""
        found = await asyncio.gather(*(self.request(arm, number, fresh(256), 64) for number in range(batch)))
        gaps = [gap for one in found for gap in one.answer.gaps[8:]]
        self._row(kind="decode", arm=arm, batch=batch, gap_ms=quantiles(gaps))

    async def _load(self, arm: str, load: Load) -> None:
        """The load's requests, at moments that are the same for every arm, until the last has its answer."""
        stop, source = asyncio.Event(), random.Random(str(load))
        long = [
            asyncio.create_task(self.request(arm, number, fresh(256), self.size.long, stop))
            for number in range(load.writing)
        ]
        try:
            if long:
                await asyncio.sleep(1)
            before = await self._moved(arm)
            begin, tasks, moment = time.perf_counter(), [], 0.0
            while (moment := moment + source.expovariate(load.rate)) < self.size.seconds:
                await asyncio.sleep(max(0.0, begin + moment - time.perf_counter()))
                tasks.append(asyncio.create_task(self.request(arm, len(tasks), fresh(load.prompt), load.answer)))
            found = await asyncio.gather(*tasks)
            end = time.perf_counter()
        finally:
            stop.set()  # else the long answers of a load that fails are written on, beside the rows that follow
        written = await asyncio.gather(*long)
        beside = [b - a for one in written for a, b in itertools.pairwise(one.answer.times) if begin < b < end]
        gaps = [gap for one in found for gap in one.answer.gaps]
        self._row(
            kind="load", arm=arm, load=str(load), requests=len(found), seconds=end - begin, **parts(found),
            gap_ms=quantiles(beside if load.writing else gaps), **await self._moved(arm, before),
        )  # fmt: skip


def parts(found: Sequence[Timed]) -> dict[str, Any]:
    """First tokens (ms); for a pair, until the prompt was read, and from then on."""
    row: dict[str, Any] = {"first_ms": quantiles(one.first for one in found)}
    split = [(one.read - one.sent, one.answer.times[0] - one.read) for one in found if one.read is not None]
    if split:
        read, handed = zip(*split, strict=True)
        row |= {"read_ms": quantiles(read), "hand_over_ms": quantiles(handed)}
    return row


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """Mean, median, 99th percentile and maximum, in milliseconds."""
    values = sorted(1e3 * value for value in seconds)
    if not values:
        return {}
    at = values[min(len(values) - 1, int(0.99 * len(values)))]
    found = {"mean": statistics.fmean(values), "p50": statistics.median(values), "p99": at, "max": values[-1]}
    return {name: round(value, 2) for name, value in found.items()}


def leading(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens are equal."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def fresh(length: int) -> list[int]:
    """A prompt that no engine of this run has seen; a load's are of the same lengths for each arm."""
    return random.Random(next(prompts)).choices(range(10, 250), k=length)


def write_model(folder: Path) -> str:
    shapes.write("8b", folder)
    return str(folder)


def demo() -> str:
    from mixquant.checkpoint.locate import DEMO

    return str(DEMO)


def machine() -> str:
    import torch
    import vllm

    count = torch.cuda.device_count()
    return f"{count} x {torch.cuda.get_device_name()}, vLLM {vllm.__version__}" if count else "a CPU"


def ucx() -> dict[str, str]:
    import torch

    return {"UCX_TLS": "cuda_ipc,cuda_copy,tcp,sm,self" if torch.cuda.is_available() else "tcp,self,shm"}


if __name__ == "__main__":
    main()
