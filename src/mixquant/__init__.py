"""Phase-aware quantization for LLM inference: prompts in NVFP4, FP8 or INT8, answers in BF16.

    model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=mixquant.MixQuantConfig(prefill="nvfp4"))
    mixquant.convert_(model, "nvfp4")                # or in place, any torch causal LM
    mixquant.memory(model); mixquant.explain(model)  # the bill; kernel by layer and phase
    mixquant.quantize(MODEL, "nvfp4", output=DIR)    # a folder of quantized weights that every engine loads

Names load on first use: importing mixquant imports neither torch nor Transformers nor vLLM.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixquant.checkpoint.locate import DEMO as DEMO
    from mixquant.errors import InputError as InputError
    from mixquant.integrations.transformers import MixQuantConfig as MixQuantConfig
    from mixquant.model.convert import convert_ as convert_
    from mixquant.model.explain import activation_ranges as activation_ranges
    from mixquant.model.explain import explain as explain
    from mixquant.model.memory import memory as memory
    from mixquant.model.tracking import prompt_length as prompt_length
    from mixquant.offline.pipeline import quantize as quantize
    from mixquant.policy import Policy as Policy

__version__ = "0.1.0"

_HOMES = {
    "DEMO": "mixquant.checkpoint.locate",
    "InputError": "mixquant.errors",
    "MixQuantConfig": "mixquant.integrations.transformers",
    "Policy": "mixquant.policy",
    "activation_ranges": "mixquant.model.explain",
    "convert_": "mixquant.model.convert",
    "explain": "mixquant.model.explain",
    "memory": "mixquant.model.memory",
    "prompt_length": "mixquant.model.tracking",
    "quantize": "mixquant.offline.pipeline",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mixquant' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
