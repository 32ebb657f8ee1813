"""vLLM engines as processes of their own, each with an asynchronous front end, as an API server has it.

Token ids go in and come out with the time of their arrival, by the clock that all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One request's tokens, when each came (seconds), and where its KV is kept, if that was asked for."""

    times: list[float]
    tokens: list[int]
    kept: dict[str, Any] | None

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.times)]


@dataclass
class Engine:
    """One engine, asked from another process's event loop."""

    name: str
    process: Any
    connection: Connection
    waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    numbers: Any = field(default_factory=itertools.count)

    @classmethod
    def start(
        cls, name: str, options: Mapping[str, Any], pair: tuple[str, str] | None, env: dict[str, str], log: Path
    ) -> Engine:
        """options: of vLLM's AsyncEngineArgs. pair: the role in a pair, and its prefill format."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(theirs, dict(options), pair, env, log), name=name)
        process.start()
        theirs.close()
        return cls(name, process, ours)

    async def ready(self, deadline: float) -> float:
        """Seconds that its start took. Raises RuntimeError with what went wrong."""
        while not self.connection.poll():
            if time.monotonic() > deadline or self.process.exitcode is not None:
                raise RuntimeError("it is not ready in time" if self.process.exitcode is None else "it ended")
            await asyncio.sleep(0.1)
        found = self.connection.recv()
        if isinstance(found, str):
            raise RuntimeError(found)
        asyncio.get_running_loop().add_reader(self.connection.fileno(), self._receive)
        return float(found)

    def _receive(self) -> None:
        try:
            number, found = self.connection.recv()
        except EOFError:
            asyncio.get_running_loop().remove_reader(self.connection.fileno())
            number, found = -1, f"{self.name} ended"
        for future in [self.waiting.pop(number)] if number >= 0 else list(self.waiting.values()):
            if not future.done():
                future.set_exception(RuntimeError(found)) if isinstance(found, str) else future.set_result(found)

    def _send(self, *message: Any) -> tuple[int, asyncio.Future[Any]]:
        number = next(self.numbers)
        self.waiting[number] = asyncio.get_running_loop().create_future()
        self.connection.send((number, *message))
        return number, self.waiting[number]

    async def ask(
        self, ids: Sequence[int], new_tokens: int, transfer: Any = None, stop: asyncio.Event | None = None
    ) -> Answer:
        """A greedy answer; until `stop` is set, where one is given. Raises RuntimeError where the engine fails."""
        number, future = self._send("ask", list(ids), new_tokens, transfer)
        if stop is not None:
            await stop.wait()
            self.connection.send((number, "stop"))
        return Answer(*await future)

    async def metrics(self) -> dict[str, float]:
        """Sums and counts of what its connector has measured."""
        found: dict[str, float] = await self._send("metrics")[1]
        return found

    def end(self) -> None:
        with suppress(OSError):
            self.connection.send((-1, "end"))
        self.process.join(15)
        if self.process.exitcode is None:
            self.process.kill()


def run(
    connection: Connection, options: dict[str, Any], pair: tuple[str, str] | None, env: dict[str, str], log: Path
) -> None:
    """The process of one engine."""
    os.environ.update(env)
    with log.open("w") as out:
        os.dup2(out.fileno(), sys.stdout.fileno())
        os.dup2(out.fileno(), sys.stderr.fileno())
    begin = time.monotonic()
    try:
        if pair is not None:
            options["kv_transfer_config"] = transfer_config(options["model"], *pair)
        asyncio.run(serve(connection, options, begin))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}"[:400])
        raise


def transfer_config(model: str, role: str, format: str) -> Any:
    """What `mixquant serve MODEL --role ROLE` passes to vLLM."""
    from vllm.config import KVTransferConfig

    from mixquant.checkpoint.locate import find
    from mixquant.integrations.vllm import pair

    found = find(model)
    options = pair.connector_options(role, pair.prefill_policy({"prefill": format}, found), found)
    return KVTransferConfig(**json.loads(options[options.index("--kv-transfer-config") + 1]))


async def serve(connection: Connection, options: dict[str, Any], begin: float) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))
    messages: asyncio.Queue[Any] = asyncio.Queue()
    asyncio.get_running_loop().add_reader(connection.fileno(), lambda: messages.put_nowait(connection.recv()))
    connection.send(time.monotonic() - begin)
    running: dict[int, asyncio.Task[None]] = {}
    while True:
        number, what, *rest = await messages.get()
        if what == "end":
            break
        if what == "metrics":
            connection.send((number, measured()))
        elif what == "stop":
            running[number].cancel()
        else:
            running[number] = asyncio.create_task(answer(llm, connection, number, *rest))
    llm.shutdown()


async def answer(llm: Any, connection: Connection, number: int, ids: list[int], new_tokens: int, transfer: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA,
        extra_args={"kv_transfer_params": transfer} if transfer else None,
    )  # fmt: skip
    times: list[float] = []
    tokens: list[int] = []
    kept = None
    try:
        async for output in llm.generate({"prompt_token_ids": ids}, sampling, f"request-{number}"):
            tokens += output.outputs[0].token_ids
            times += [time.perf_counter()] * len(output.outputs[0].token_ids)
            kept = output.kv_transfer_params or kept
    except asyncio.CancelledError:
        pass  # what came before the end was asked for
    except Exception as error:
        connection.send((number, f"{type(error).__name__}: {error}"[:400]))
        return
    connection.send((number, (times, tokens, kept) if tokens else "no token came"))


def measured() -> dict[str, float]:
    """Sums and counts of NIXL's histograms in this process."""
    from prometheus_client import REGISTRY

    samples = (sample for metric in REGISTRY.collect() for sample in metric.samples)
    found = (sample for sample in samples if sample.name.startswith("vllm:nixl"))
    return {sample.name: sample.value for sample in found if not sample.name.endswith(("_bucket", "_created"))}
