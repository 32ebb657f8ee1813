"""The arms of a run: ways to run one model, by name.

    chosen(["bf16", "uniform", "phase", "phase-control"], ["tail64=nvfp4,tail=64"], "nvfp4", tail=32)

Five have names of their own (`mixquant.policy.ARMS`), in one format and with one tail. Any other policy becomes an arm
as `NAME=POLICY`, with `weights=DIR` among its fields where its quantized weights are those of a folder. `NAME-control`
is the arm NAME once more, in other batches and with another attention kernel: the same arithmetic up to rounding. For
the reference that is the noise floor. For a quantized arm it is another draw of the same error, since roundings that
hardly differ fall into other codes; how far apart two draws are says how much of the arm's distance is chance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mixquant.errors import InputError
from mixquant.policy import ARMS, OF_CONTROLS, REFERENCE, TAIL, Policy, choose_name, controlled, read_fields
from mixquant.policy import arm as standard_policy


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm. weights: the folder of its quantized weights; None for MODEL's own, or those made at load. names_tail:
    somebody has named the policy's tail; else a benchmark's engine takes its own default."""

    name: str
    policy: Policy
    weights: str | None = None
    names_tail: bool = False

    @property
    def of(self) -> str | None:
        """The arm whose control this is."""
        return controlled(self.name)

    @property
    def quantizes(self) -> tuple[bool, bool]:
        """Whether it quantizes (prefill, decode)."""
        return self.policy.prefill != REFERENCE, self.policy.decode != REFERENCE

    def to_dict(self) -> dict[str, Any]:
        """What a run is told by: JSON values."""
        return self.policy.to_dict() | ({"weights": self.weights} if self.weights else {})


def standard(name: str, format: str, tail: int = TAIL) -> Arm:
    """One of the arms that have names of their own, or its control; InputError for another name."""
    known = name.removesuffix(OF_CONTROLS)
    if known not in ARMS:
        choose_name("arm", name, ARMS)
    return Arm(name=name, policy=replace(standard_policy(known, format), tail=tail))


def asked(text: str) -> Arm:
    """`NAME=POLICY` as an arm. InputError where it says none."""
    name, equals, policy = text.partition("=")
    if not equals or not policy or not re.fullmatch(r"[\w.+-]+", name):
        raise InputError(f"{text!r} is no arm: write NAME=POLICY, such as tail64=nvfp4,tail=64.")
    if name in ARMS or name.endswith(OF_CONTROLS):
        raise InputError(f"The arm {name} has its own policy: give yours another name.")
    parts = [part.strip() for part in policy.split(",")]
    given = [part for part in parts if part.startswith("weights=")]
    rest = ",".join(part for part in parts if part not in given)
    names_tail = any(part.partition("=")[0].strip() == "tail" for part in parts)
    try:
        weights = read_fields(",".join(given))["weights"] if given else None
        return Arm(name=name, policy=Policy.parse(rest), weights=weights, names_tail=names_tail)
    except InputError as error:
        raise InputError(f"The arm {name}: {error}") from None


def chosen(names: Sequence[str], questions: Sequence[str], format: str, tail: int = TAIL) -> dict[str, Arm]:
    """The arms of a run by name, each before its control. InputError for unknown names, and for names given twice."""
    own = {arm.name: arm for arm in map(asked, questions)}
    found = [_named(name, own, format, tail) for name in (*names, *own)]
    if len({arm.name for arm in found}) < len(found) or len(own) < len(questions):
        raise InputError("An arm is named twice: name each arm once.")
    for arm in found:
        if arm.of and arm.of not in [other.name for other in found]:
            raise InputError(f"{arm.name} repeats the arm {arm.of}: add that to the arms.")
        if arm.policy.prefill == "auto":
            raise InputError(f"The arm {arm.name} leaves its format open: name nvfp4, fp8, int8 or bf16.")
    return {
        arm.name: arm for arm in sorted(found, key=lambda arm: (arm.name != REFERENCE, arm.of not in (None, REFERENCE)))
    }


def _named(name: str, own: dict[str, Arm], format: str, tail: int) -> Arm:
    known = name.removesuffix(OF_CONTROLS)
    return replace(own[known], name=name) if known in own else standard(name, format, tail)
