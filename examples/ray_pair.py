"""A pair on Ray Serve LLM: its prefill/decode pattern, with our plugin and connector in its engines' arguments.

    pip install 'mixquant[vllm,pair]' 'ray[serve,llm]'
    serve run examples.ray_pair:build model=org/model prefill=fp8      # from a checkout; two GPUs

Ray's decode server asks a prefill server first, and then its own engine, as vLLM's router does. Ray compares nothing:
what does not fit is found at NIXL's first handshake, where both sides must name the same model, tokenizer and policy
(docs/pair.md).

Where it stops: tests/test_examples.py makes vLLM's configurations of both sides from these arguments and compares what
the servers of a pair must agree on. By hand, Ray 2.60.0 has served the demo model so on a CPU (in float32, with
`placement_group_config={"bundles": [{"CPU": 1}]}`): its log-probabilities were those of one engine, and not BF16's. On
GPUs it has not run.
"""

from __future__ import annotations

import json
from typing import Any

from mixquant.checkpoint.locate import find
from mixquant.integrations.vllm import pair
from mixquant.policy import METHOD


def engine_kwargs(model: str, role: str, prefill: str) -> dict[str, Any]:
    """vLLM's arguments for the prefill or the decode servers; prefill is the format of prompts on both."""
    found = find(model)
    policy = pair.prefill_policy({"prefill": prefill}, found)
    _, connector, *_ = pair.connector_options(role, policy, found)
    arguments: dict[str, Any] = {"kv_transfer_config": json.loads(connector)}
    if role == "prefill":
        method = {"quant_method": METHOD, **policy.to_dict()}
        arguments |= {"quantization": METHOD, "hf_overrides": {"quantization_config": method}}
    return arguments


def build(args: dict[str, str]) -> Any:
    """Ray's application, for `serve run`: two servers of each kind at most."""
    from ray.serve.llm import LLMConfig, build_pd_openai_app

    model, prefill = args["model"], args.get("prefill", "fp8")

    def config(role: str) -> LLMConfig:
        found = find(model)
        return LLMConfig(
            model_loading_config={
                "model_id": model,
                "model_source": found.served if role == "prefill" else found.decode,
            },
            deployment_config={"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
            engine_kwargs=engine_kwargs(model, role, prefill),
        )

    return build_pd_openai_app({"prefill_config": config("prefill"), "decode_config": config("decode")})
