"""Which linear layers are quantized, told by their names: what never is, what engines fuse, what experts are called.

A pattern is one of a shell, such as `*.o_proj`, whose `*` also goes across dots, or with `re:` before it a regular
expression that a name begins with, as in compressed-tensors: `re:.*o_proj`. The case of letters counts.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterable

from mixquant.errors import InputError

NEVER = (
    "*lm_head", "*embed_out", "*output_projection",  # output heads
    "*.gate", "*.router", "*shared_expert_gate",  # MoE routers
    "*visual*", "*vision*", "*audio*", "*multi_modal_projector*",  # towers: other row counts
    "*kv_b_proj", "*mtp.*", "*.eagle*",  # MLA absorption, draft heads
)  # fmt: skip
"""Name patterns of layers that stay as they are in every phase."""


EXPERTS = "*experts*"
"""Names of the 3-D parameters into which Transformers fuses the experts of an MoE: no linear layers, so left alone."""


FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
)
"""Siblings that engines fuse, by name (vLLM's `packed_modules_mapping` of its text models)."""


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's full name matches one of the patterns: `NEVER`, a policy's `ignore`, an engine's own."""
    return any(matches(name, pattern) for pattern in patterns)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a layer."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def check_patterns(patterns: Iterable[str], names: Collection[str]) -> None:
    """Raise InputError for a pattern of `ignore` that names none of the layers in `names`: it would do nothing."""
    for pattern in patterns:
        try:
            found = any(matches(name, pattern) for name in names)
        except re.error as error:
            raise InputError(
                f"The pattern {pattern!r} in `ignore` is no regular expression ({error}): mend it, or write *.name."
            ) from None
        if not found:
            endings = {f"*.{name.rpartition('.')[2]}" for name in names}
            close = difflib.get_close_matches(pattern, sorted({*names, *endings}), n=1, cutoff=0.0)
            hint = f": did you mean {close[0]!r}?" if close else "."
            raise InputError(f"No layer is called {pattern!r}, which is to be ignored{hint}")
