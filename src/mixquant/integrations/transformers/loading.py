"""Loading MODEL with Transformers; every way in which it cannot be loaded is one sentence.

Code that a checkpoint brings along is never run, and nobody is asked whether it may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mixquant.checkpoint.locate import Found, already_quantized
from mixquant.errors import InputError
from mixquant.integrations.transformers.quantizer import MixQuantConfig
from mixquant.model.convert import convert_
from mixquant.policy import Policy

_WINDOWS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
"""What configurations call the context window: most of them, GPT-2, MPT, DBRX's kind, BLOOM and ChatGLM, CTRL."""

_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*tiktoken*", "tekken.json")


def load_model(
    found: Found, policy: Policy | str | Mapping[str, Any], device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A converted causal LM, quantized while it loads; its prefill weights are the quantized ones that were found."""
    return load_with(found, MixQuantConfig(Policy.parse(policy), prefill_weights=found.quantized), device, dtype)


def load_with(
    found: Found, config: MixQuantConfig | None, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """A causal LM, converted while it loads as `config` says; None leaves it as it is."""
    load_config(found)
    with _readable(found):
        model, info = AutoModelForCausalLM.from_pretrained(
            found.decode,
            revision=found.revision,
            trust_remote_code=False,
            quantization_config=config,
            dtype=dtype,
            device_map={"": str(device)},
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{found.decode} lacks {missing[0]} and {len(missing) - 1} more weights: use a complete checkpoint."
        )
    return model


def made_up(found: Found, policy: Policy | None, device: torch.device) -> PreTrainedModel:
    """A model of this shape with random weights, converted where there is a policy."""
    config = load_config(found)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False).eval()
    return model if policy is None else convert_(model, policy)


def load_tokenizer(found: Found) -> PreTrainedTokenizerBase:
    """The BF16 model's tokenizer."""
    if found.folder and not any(next(found.folder.glob(pattern), None) for pattern in _TOKENIZERS):
        raise InputError(f"{found.folder} has no tokenizer: copy tokenizer.json beside the weights.")
    with _readable(found):
        return AutoTokenizer.from_pretrained(found.decode, revision=found.revision, trust_remote_code=False)


def load_config(found: Found) -> Any:
    """The BF16 model's configuration; InputError unless it names a causal language model that is not quantized."""
    with _readable(found):
        config = AutoConfig.from_pretrained(found.decode, revision=found.revision, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise InputError(
            f"{config.model_type} is not a causal language model of Transformers: choose a decoder-only one."
        )
    if method := (getattr(config, "quantization_config", None) or {}).get("quant_method"):
        raise already_quantized(found.decode, method)
    return config


def context_window(config: Any) -> int | None:
    """The longest sequence in tokens that a configuration states, by any of the names models have for it; else None."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _WINDOWS)
    return next((window for window in found if isinstance(window, int) and window > 0), None)


def activation_bytes(config: Any) -> int:
    """Bytes that a token takes while it is read with its prompt in one forward, roughly: a layer's rows, in 16 bits."""
    text = config.get_text_config()
    return int(2 * (6 * text.hidden_size + 3 * text.intermediate_size))


def cache_bytes(config: Any) -> int:
    """Bytes that the KV cache takes for one token, in 16 bits."""
    text = config.get_text_config()
    layers = text.num_hidden_layers
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention keeps one vector for all heads
        return int(2 * layers * (text.kv_lora_rank + text.qk_rope_head_dim))
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * 2 * layers * heads * size)


def meta_model(found: Found) -> PreTrainedModel:
    """The model without weights, on the meta device: enough for the memory bill."""
    config = load_config(found)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)


class _readable:
    """Turns what Transformers raises for an unreadable model into one sentence."""

    def __init__(self, found: Found) -> None:
        self.found = found

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError):
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"{self.found.decode} brings Python code of its own, which mixquant never runs: choose a model "
                    "whose class Transformers has."
                ) from error
            first = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
            remedy = "mend or download its files" if self.found.folder else "check the name and the network"
            raise InputError(f"Cannot read {self.found.decode} ({type(error).__name__}: {first}): {remedy}.") from error
