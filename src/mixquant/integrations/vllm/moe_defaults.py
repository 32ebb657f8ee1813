"""What an engine does by default where tokens are routed to experts: a tail of 1, and larger CUDA graphs.

The step with a prompt's end computes the tail by BF16 experts and the rest by quantized ones, and reads both. One row
reads 8 of 128 experts, 32 rows read 111 of them: nearly a second pass over the weights. In Qwen3-30B-A3B's shape, on an
H200 (vLLM 0.26, microseconds for one layer, benchmarks/results/experts-layer-h200.md), experts take

    rows     BF16    FP8     BF16 for 1, then FP8    BF16 for 32, then FP8
    256      333     224     256                     485
    2,048    502     418     452                     681
    8,192    1,447   1,221   1,266                   1,492

so with a tail of 32 they are slower than in BF16 at each of these lengths, and with one of 1 faster. In GLM-4.5-Air's
shape, whose experts are 3.7 times as large, 32 gain at 8,192 rows.

Starting both takes the host 900 us a layer, in either shape: longer than the device up to 5,500 rows of the first, and
up to 1,300 of the second. Up to there a step is faster from a graph, which costs padding.
"""

from __future__ import annotations

from typing import Any

from mixquant.layers import is_ignored
from mixquant.policy import Policy

TAIL_WITH_EXPERTS = 1

GRAPH_SIZES = (2560, 3072, 3584, 4096, 4608, 5120, 6144, 8192)
"""Rows of the steps that are captured beyond those of other models (`places.WIDE_SIZES`), if they wait for the host."""

WAITS_FOR_HOST = 5500 * 8 * 3 * 2048 * 768
"""Rows times the weights of a layer's experts that each is multiplied by, up to which the host takes longer."""

NUMBERS_OF_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
"""What configurations of Transformers call how many experts there are; vLLM asks for the same."""

PLACES_OF_EXPERTS = ("mlp.experts", "block_sparse_moe.experts", "feed_forward.experts", "mixer.experts")
"""Where a decoder layer has its experts, by family."""


def graph_sizes(moe: Any) -> tuple[int, ...]:
    """Of `GRAPH_SIZES` those at which steps wait for the host; `moe` is vLLM's FusedMoEConfig of a layer."""
    weights = moe.experts_per_token * 3 * moe.hidden_dim * moe.intermediate_size_per_partition
    return tuple(size for size in GRAPH_SIZES if size * weights <= WAITS_FOR_HOST)


def routes(hf_config: Any, policy: Policy) -> bool:
    """Whether a model has routed experts that a phase-aware policy quantizes; `hf_config` is that of Transformers."""
    if hf_config is None or policy.prefill == policy.decode or policy.role == "prefill":
        return False
    text = hf_config.get_text_config()
    found = next((number for name in NUMBERS_OF_EXPERTS if (number := getattr(text, name, None))), 0)
    number = found[0] if isinstance(found, list) else found
    # Nemotron-H's configuration has a number of experts even where no layer is one.
    has_layers = "E" in (getattr(text, "hybrid_override_pattern", None) or "E")
    return number > 1 and has_layers and not _ignored(policy, text.num_hidden_layers)


def _ignored(policy: Policy, layers: int) -> bool:
    """Whether `ignore` names all experts, by any of the names that vLLM may have for them."""
    some = {0, 1, layers - 1}
    return any(
        all(is_ignored(f"{model}.layers.{layer}.{place}", policy.ignore) for layer in some)
        for model in ("model", "language_model.model", "backbone")
        for place in PLACES_OF_EXPERTS
    )
