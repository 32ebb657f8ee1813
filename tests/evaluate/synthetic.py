"""Records of a made-up run: examples of random hardness, on which arms diverge and err at chosen rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from random import Random
from typing import Any, NamedTuple

from mixquant.evaluate.records import Record
from mixquant.evaluate.summary import summarize
from mixquant.policy import ARMS

TASKS, RUNGS, SEEDS = ("arithmetic", "lookup"), 3, (100, 101)


class Damage(NamedTuple):
    """What an arm does to answers: the scale of its KL divergence in nats, and the shares of examples it flips."""

    kld: float = 1e-9
    lost: float = 0.001
    won: float = 0.001


USUAL = {
    "bf16-control": Damage(),
    "uniform": Damage(2e-3, 0.09, 0.03),
    "phase": Damage(1e-5, 0.002, 0.002),
    "decode-only": Damage(2e-3, 0.09, 0.03),
}
"""An engine in which all of the damage comes from quantizing the answer."""


def records(n: int, damage: Mapping[str, Damage] = USUAL, seed: int = 0, forced: bool = True) -> list[Record]:
    """`n` examples for the reference and each arm of `damage`, spread over tasks, rungs and seeds.

    forced: whether the engine can force answers.
    """
    rng = Random(seed)
    made: list[Record] = []
    for number in range(n):
        made += _example(rng, number, damage, forced)
    return made


def _example(rng: Random, number: int, damage: Mapping[str, Damage], forced: bool) -> Iterator[Record]:
    place, index = number % (len(TASKS) * RUNGS * len(SEEDS)), number // (len(TASKS) * RUNGS * len(SEEDS))
    rung = place // len(TASKS) % RUNGS
    reference = [rng.randrange(50) for _ in range(rng.randint(4, 24))]
    right, hardness = rng.random() < 0.95 - 0.3 * rung, rng.lognormvariate(0, 2)
    same: dict[str, Any] = {
        "task": TASKS[place % len(TASKS)], "rung": rung, "seed": SEEDS[place // (len(TASKS) * RUNGS)],
        "index": index, "label": f"{rung + 1} steps", "prompt_tokens": 200 * 2**rung + rng.randrange(50), "text": "",
    }  # fmt: skip
    yield Record(arm="bf16", right=right, answer=reference, **same)
    for arm, (scale, lost, won) in damage.items():
        kld = [scale * hardness * 2 * rng.random() for _ in reference]
        flips = [position for position, value in enumerate(kld) if value > 0.05]
        answer = [token + (position in flips[:1]) for position, token in enumerate(reference)]
        flipped = rng.random() < (lost if right else won)
        forcing = {"kld": kld, "flips": flips} if forced else {}
        yield Record(arm=arm, right=right ^ flipped, answer=answer, **same, **forcing)


def summarized(records: Iterable[Record], run: Mapping[str, Any]) -> dict[str, Any]:
    """The results as JSON values: what tests read."""
    return summarize(records, run).to_dict()


def run(damage: Mapping[str, Damage] = USUAL) -> dict[str, Any]:
    """What `summarize` is told of such a run."""
    arms = [arm for arm in ARMS if arm == "bf16" or arm in damage]
    quantized = {"prefill": ["emulation.nvfp4"], "decode": ["torch.linear"]}
    plain = {"prefill": ["torch.linear"], "decode": ["torch.linear"]}
    return {
        "model": {"name": "demo", "hash": None},
        "engine": "transformers", "device": "CPU", "versions": {"torch": "2.13"}, "threads": 1,
        "command": "mixquant eval demo", "format": "nvfp4", "tail": 1, "seeds": list(SEEDS), "limit": None,
        "suites": ["agent"],
        "arms": {
            arm: {"emulated": not arm.startswith("bf16"), "kernels": plain if arm.startswith("bf16") else quantized}
            for arm in arms
        },
        "time": {"seconds": {}, "total_seconds": 1.0, "started": 1767225600.0},
    }  # fmt: skip
