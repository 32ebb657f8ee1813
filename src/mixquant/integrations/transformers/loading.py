"""Loading MODEL with Transformers, with every way it can be unfit said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixquant.checkpoint.locate import locate
from mixquant.errors import InputError
from mixquant.policy import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*tiktoken*", "tekken.json")


def load_model(
    name: str, policy: Policy | str | Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A converted causal LM, quantized while it loads.

    Of a quantized folder with `mixquant.json`: the BF16 model that it names, with the folder's prefill weights.
    """
    from transformers import AutoModelForCausalLM

    from mixquant.checkpoint.sidecar import phase_models
    from mixquant.integrations.transformers import MixQuantConfig

    load_config(name)
    name, prefill_weights = phase_models(name)
    config = MixQuantConfig(Policy.parse(policy), prefill_weights=prefill_weights)
    with _readable(name):
        model, info = AutoModelForCausalLM.from_pretrained(
            locate(name),
            quantization_config=config,
            dtype=dtype,
            device_map={"": str(device)},
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name} lacks {missing[0]} and {len(missing) - 1} more weights: use a complete checkpoint.")
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    folder = Path(locate(name))
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise InputError(f"{folder} has no tokenizer: copy tokenizer.json beside the weights.")
    with _readable(name):
        return AutoTokenizer.from_pretrained(locate(name))


def load_config(name: str) -> Any:
    """The BF16 model's configuration; InputError unless it names a causal language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from mixquant.checkpoint.sidecar import phase_models

    name, _ = phase_models(name)
    with _readable(name):
        config = AutoConfig.from_pretrained(locate(name))
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"{config.model_type} is not a causal language model of Transformers: choose a decoder-only one."
        )
    if method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        raise InputError(f"{name} is already quantized by {method}: use the original BF16 checkpoint.")
    return config


def meta_model(name: str, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """The model without weights, on the meta device: enough for the memory bill."""
    from transformers import AutoModelForCausalLM

    config = load_config(name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class _readable:
    """Turns what Transformers raises for an unreadable model into one sentence."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            remedy = "mend or download its files" if Path(self.name).is_dir() else "check the name and the network"
            raise InputError(f"Cannot read {self.name} ({type(error).__name__}: {first}): {remedy}.") from error
