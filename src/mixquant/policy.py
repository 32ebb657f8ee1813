"""What to quantize, in which phase, and how: one frozen configuration for every engine.

    Policy.parse("nvfp4")                     a preset: prompt tokens NVFP4, generated tokens BF16
    Policy.parse("uniform-fp8")               a preset of another arm
    Policy.parse("nvfp4,tail=16")             a preset and fields, or fields alone
    Policy.parse({"prefill": "int8", "tail": 4})

The *arms* that the evaluator compares are presets too: `bf16` (the reference), `bf16-control` (the same in batches of
another composition, which is the engine's business), `phase` (ours, the plain format name), `uniform` (both phases
quantized) and `decode-only` (the opposite of ours, for diagnosis). `ARMS` is their one table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mixquant.errors import InputError

METHOD = "mixquant"
"""What engines know us by: the quantization method in vLLM's and Transformers' configurations."""

QUANTIZED = ("nvfp4", "fp8", "int8")
FORMATS = ("auto", *QUANTIZED, "bf16")
SCALES = ("search", "amax")
STORAGES = ("auto", "nested", "separate")
ROLES = ("both", "prefill")
TAIL = 32
"""How many of the last prompt tokens are precise, unless a policy says otherwise: a third off the divergence, for
nothing. A step that many prompts share pays from 64 on (docs/how-good.md, "A longer tail")."""
BY_ROLE: Any = None
"""A tail that nobody gives: `TAIL`, or 1 under role=prefill, where the decode server reads the last prompt token."""
REFERENCE = "bf16"
OF_CONTROLS = "-control"
"""NAME-control is the arm NAME again, in batches of another composition: what that alone changes."""
CONTROL = REFERENCE + OF_CONTROLS
ARMS = {
    REFERENCE: (False, False),
    CONTROL: (False, False),
    "uniform": (True, True),
    "phase": (True, False),
    "decode-only": (False, True),
}
"""Whether an arm quantizes (prefill, decode); in the order in which arms are run and shown."""

NESTABLE = {("auto", "bf16"), ("fp8", "bf16"), ("nvfp4", "bf16"), ("auto", "auto"), ("fp8", "fp8")}
"""(prefill, decode) that a nested weight serves. Beside NVFP4 prompts it serves decode alone, uniform FP8 is its plane,
and what `auto` means is told on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One policy; unknown keys and illegal combinations raise InputError.

    prefill: format of the linear layers for prompt tokens: auto, nvfp4, fp8, int8 or bf16 (the checkpoint's dtype).
    decode: format for all other tokens: bf16, or a quantized format (arms `uniform` and `decode-only`).
    tail: how many of the last prompt tokens are precise: 32, and 1 under role=prefill. vLLM's plugin takes 1 for a
        model with routed experts, unless a tail is named (`integrations.vllm.moe_defaults`).
    min_prompt: a request with fewer prompt tokens to read when it is first scheduled is precise altogether; 0: none is;
        None: what was measured on the device (vLLM on CUDA with FP8 prompts: 512, or 256 where weights nest; 0
        elsewhere). For vLLM alone.
    scales: how NVFP4 weight scales are chosen: `search` (within +-8 codes of amax, data-free) or `amax`.
    ignore: further layers that stay BF16 in every phase: shell patterns over module names, such as `*.o_proj`.
    native: refuse emulated kernels.
    storage: whether both phases share one weight: `nested`, an FP8 plane and four bits more that together are the BF16
        weight (`formats.nested`); `separate`, a copy for each; `auto`: nested on GPUs where that has been measured to
        pay, for layers that allow it. Nested takes half of two copies, and decodes faster up to 64 rows at once.
    role: `both` phases in one engine, or `prefill`: the engine reads prompts for another one that decodes, and holds
        the quantized weights alone.

    >>> from mixquant import Policy
    >>> policy = Policy(prefill="int8", tail=4)
    >>> policy.decode
    'bf16'
    >>> Policy.parse({"prefill": "int8", "tail": 4}) == policy
    True
    """

    prefill: str = "auto"
    decode: str = "bf16"
    tail: int = BY_ROLE
    min_prompt: int | None = None
    scales: str = "search"
    ignore: tuple[str, ...] = ()
    native: bool = False
    storage: str = "auto"
    role: str = "both"

    def __post_init__(self) -> None:
        choose_name("prefill format", self.prefill, FORMATS)
        choose_name("decode format", self.decode, FORMATS)
        choose_name("scale rule", self.scales, SCALES)
        choose_name("storage", self.storage, STORAGES)
        choose_name("role", self.role, ROLES)
        if self.tail is BY_ROLE:
            object.__setattr__(self, "tail", TAIL if self.role == "both" else 1)
        for key, value in (("tail", self.tail), ("min_prompt", 0 if self.min_prompt is None else self.min_prompt)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"{key} is a number of prompt tokens, 0 or more, not {value!r}.")
        if not isinstance(self.native, bool):
            raise InputError(f"native is true or false, not {self.native!r}.")
        if not isinstance(self.ignore, (list, tuple)) or not all(isinstance(p, str) for p in self.ignore):
            raise InputError(f'ignore is a list of name patterns such as ["*.o_proj"], not {self.ignore!r}.')
        object.__setattr__(self, "ignore", tuple(self.ignore))
        if self.decode not in ("bf16", self.prefill) and self.prefill != "bf16":
            raise InputError(
                f"prefill={self.prefill} with decode={self.decode} mixes two quantized formats: "
                f"use decode=bf16 (phase), decode={self.prefill} (uniform) or prefill=bf16 (decode-only)."
            )
        if self.storage == "nested" and (self.prefill, self.decode) not in NESTABLE:
            raise InputError(
                f"storage=nested is one weight for FP8 and BF16, not for prefill={self.prefill}, decode={self.decode}: "
                "use prefill=fp8 or nvfp4 with decode=bf16, fp8 for both, or storage=separate."
            )
        if self.role == "prefill" and (self.decode, self.tail) != ("bf16", 1):
            raise InputError(
                f"role=prefill hands over to a server that computes the last prompt token and the answer in BF16, so "
                f"decode={self.decode}, tail={self.tail} cannot be: leave both out."
            )
        if self.role == "prefill" and self.min_prompt:
            raise InputError(
                f"role=prefill holds the quantized weights alone, so min_prompt={self.min_prompt} cannot be: leave it "
                "out."
            )

    @classmethod
    def parse(cls, value: Policy | str | Mapping[str, Any]) -> Policy:
        """A policy from itself, a preset's name, a text of fields behind it, or a mapping of its fields."""
        if isinstance(value, Policy):
            return value
        if isinstance(value, str):
            preset, _, fields_ = ("", "", value) if "=" in value.partition(",")[0] else value.partition(",")
            start = PRESETS[choose_name("policy preset", preset, PRESETS)] if preset else cls()
            arm = {"prefill": start.prefill, "decode": start.decode}  # all that presets differ in
            return cls.parse(arm | read_fields(fields_)) if fields_ else start
        if not isinstance(value, Mapping):
            raise InputError(f"A policy is a preset's name or a mapping of its fields, not {value!r}.")
        known = [field.name for field in fields(cls)]
        for key in value:
            choose_name("policy key", key, known)
        return cls(**value)

    @property
    def held(self) -> Policy:
        """The policy of the weights that this engine holds: a prefill server has one product for every row."""
        return self if self.role == "both" else replace(self, decode=self.prefill, tail=0, min_prompt=0, role="both")

    def in_format(self, format: str) -> Policy:
        """The same arm in another format; InputError where its storage cannot hold that."""
        prefill, decode = ("bf16" if was == "bf16" else format for was in (self.prefill, self.decode))
        return replace(self, prefill=prefill, decode=decode, storage="separate" if format == "bf16" else self.storage)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready fields; `Policy.parse` reads them back."""
        return asdict(self) | {"ignore": list(self.ignore)}


def read_fields(text: str) -> dict[str, Any]:
    """`tail=4,native=true` as fields; `ignore` may stand several times."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise InputError(f"{part!r} in {text!r} sets nothing: write KEY=VALUE, such as tail=4.")
        if key in found and key != "ignore":
            raise InputError(f"{text!r} sets {key} twice: name it once.")
        read: Any = int(value) if key in ("tail", "min_prompt") and value.isdigit() else _TRUTH.get(value, value)
        found[key] = (*found.get(key, ()), value) if key == "ignore" else read
    return found


_TRUTH: dict[str, bool] = {"true": True, "false": False}


def arm(name: str, format: str) -> Policy:
    """The policy of an evaluation arm in a format."""
    prefill, decode = ARMS[choose_name("arm", name, ARMS)]
    return Policy(prefill=format if prefill else REFERENCE, decode=format if decode else REFERENCE)


def controlled(arm: str) -> str | None:
    """The arm whose control an arm is, by its name."""
    return arm.removesuffix(OF_CONTROLS) if arm.endswith(OF_CONTROLS) else None


def choose_name(what: str, value: str, allowed: Iterable[str]) -> str:
    """Return `value` if allowed; otherwise raise with the nearest valid name first."""
    names = list(allowed)
    if value in names:
        return value
    close = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise InputError(f"Unknown {what} {value!r}: {hint}Valid: {', '.join(names)}.")


PRESETS: dict[str, Policy] = {
    **{format: arm("phase", format) for format in FORMATS},
    **{f"{name}-{format}": arm(name, format) for name in ("uniform", "decode-only") for format in QUANTIZED},
}
