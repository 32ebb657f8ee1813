"""The vLLM plugin: one stock engine, prompt tokens through quantized linears, all others through BF16.

    vllm serve MODEL --quantization mixquant
    vllm serve MODEL --hf-overrides '{"quantization_config": {"quant_method": "mixquant", "prefill": "nvfp4"}}'

`register` is the `vllm.general_plugins` entry point. vLLM calls it in every process; it only makes the method's name
known. Everything else happens in a worker that builds a model with it:

    config.py      the quantization method as vLLM sees it
    checks.py      what is refused; reentry.py: answers as prompts; stores.py: external KV stores, which must not mix
                   precisions
    checkpoint.py  which files an engine runs; fused.py: a quantized folder's layers as vLLM fuses and shards them

    linear.py      the routed linear layer: a plain BF16 layer and a quantized copy of its weight, one opaque op
    moe.py         the same for a set of experts; moe_kernels.py: its quantized copies
    head.py        the output head, where weights nest
    copies.py      which layers get a quantized copy, by which kernel, made of what
    kernels.py     vLLM's own quantized kernels in the shape of `mixquant.kernels`
    parallel.py    what tensor-parallel shards of one weight agree on
    announce.py    policy, kernels and memory bill in the log; what does not fit

    step.py        the step that runs: its plan, and the form in which layers compute it; a token's life in a table
    runner.py      the contact with vLLM's model runners: the phase of every scheduled token; hooks.py: how they are
                   wrapped; short_prompts.py: requests that are read precisely
    graphs.py      which CUDA graphs are captured, and which may replay the step; places.py: how many precise rows they
                   hold; graph_memory.py: what they will take
    routed.py      a layer's two products, and the choice between them
    counters.py    rows by phase at /metrics

    pair.py        prefill and decode on servers of their own: roles, identity; facts.py: what they must agree on, asked
                   over HTTP; nixl.py: the connector that hands KV over within a pair; fetches.py: KV that comes late

Three uses of it are no part of the plugin:

    server.py      `mixquant serve`; cpu.py: its KV cache on a CPU
    engine.py      the evaluator's backend; forcing.py: answers forced during decode
    bench.py       the benchmark's engines; rates.py: what their GPU reaches; overheard.py: why one does not start;
                   load.py: servers that run already, under load
"""

from __future__ import annotations

import logging

from mixquant.policy import METHOD as METHOD


def register() -> None:
    """Make `--quantization mixquant` known to this process; calling it again changes nothing.

    A vLLM without the names that the plugin builds on must still serve everybody else: then the method stays unknown,
    and the log says why.
    """
    try:
        from mixquant.integrations.vllm.config import register_method
    except ImportError as error:
        message = "mixquant is not available, because this vLLM is none of 0.26 to 0.33 (%s): install one of these."
        logging.getLogger(f"vllm.{__name__}").warning(message, error)
    else:
        register_method()
