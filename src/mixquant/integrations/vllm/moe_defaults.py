"""What an engine does by default where tokens are routed to experts: a tail of 1, and larger CUDA graphs.

The step with a prompt's end computes the tail by BF16 experts and the rest by quantized ones, and reads both. One row
reads 8 of 128 experts, 32 rows read 111 of them: nearly a second pass over the weights. In Qwen3-30B-A3B's shape, on an
H200 (vLLM 0.26, microseconds for one layer, benchmarks/results/experts-layer-h200.md), experts take

    rows     BF16    FP8     BF16 for 1, then FP8    BF16 for 32, then FP8
    256      333     224     256                     485
    2,048    502     418     452                     681
    8,192    1,447   1,221   1,266                   1,492

so a tail of 32 is slower than BF16 at any of these lengths, and one of 1 is faster (in GLM-4.5-Air's shape 32 gain from
8,192 rows on). Starting the two takes the host 900 us a layer, longer than the device up to about 5,000 rows: so graphs
hold steps of up to 6,144.
"""

from __future__ import annotations

from typing import Any

from mixquant.layers import is_ignored
from mixquant.policy import Policy

TAIL_WITH_EXPERTS = 1

GRAPH_SIZES = (2560, 3072, 3584, 4096, 5120, 6144)
"""Rows of the steps that are captured beyond those of other models (`places.WIDE_SIZES`)."""

NUMBERS_OF_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""What configurations of Transformers call how many experts there are; vLLM asks for the same."""


def routes(hf_config: Any, policy: Policy) -> bool:
    """Whether a model has routed experts that a phase-aware policy quantizes; `hf_config` is that of Transformers."""
    if hf_config is None or policy.prefill == policy.decode or policy.role == "prefill":
        return False
    text = hf_config.get_text_config()
    found = any(getattr(text, name, None) for name in NUMBERS_OF_EXPERTS)
    return found and not is_ignored("model.layers.0.mlp.experts", policy.ignore)
