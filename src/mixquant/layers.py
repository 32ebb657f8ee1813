"""Which linear layers are quantized, told by their names: what never is, what engines fuse, what experts are called.

Patterns are those of a shell, `*` also across dots, and the case of letters counts.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

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
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
