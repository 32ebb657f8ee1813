"""Which files an engine runs: the BF16 model, and the quantized folder of its prefill weights, if there is one.

A folder comes in by one of two ways, and the BF16 weights always are what vLLM's own loader loads:

    vllm serve DIR --quantization mixquant       DIR/mixquant.json names the BF16 model, and vLLM's loader is sent there
    vllm serve MODEL --hf-overrides ...          with "prefill_weights": "DIR" among the fields of the policy

How a folder's layers become vLLM's is `fused`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vllm.config import VllmConfig

from mixquant.checkpoint.locate import Found, fetch
from mixquant.checkpoint.prefill import resolve_policy
from mixquant.checkpoint.quantized import QuantizedFolder
from mixquant.checkpoint.sidecar import find_sidecar
from mixquant.errors import InputError
from mixquant.policy import Policy


@dataclass(frozen=True)
class Sources:
    """What an engine runs: a policy with its format named where a folder decides it; the folder; and the BF16 model,
    where it is another one than vLLM was given."""

    policy: Policy
    folder: QuantizedFolder | None = None
    decode_model: str | None = None

    def send_loader(self, config: VllmConfig) -> None:
        """Point vLLM's loader to the BF16 model. Called in each worker, before its weights are loaded."""
        if self.decode_model is None:
            return
        model, draft = config.model_config, getattr(config.speculative_config, "draft_model_config", None)
        if draft is not None and draft is not model and draft.model == model.model:  # n-grams' is the model's own
            raise InputError(
                f"The draft would read its weights from the quantized folder {draft.model}: serve "
                f'{self.decode_model} with "prefill_weights" naming the folder.'
            )
        model.model, model.revision = self.decode_model, None


def resolve(found: Found, policy: Policy | None, prefill_weights: str | None) -> Sources:
    """The sources of an engine that vLLM was told to start on a model; `policy` is what the user said, if anything."""
    if prefill_weights is not None:
        if found.quantized is not None:
            raise InputError(f"{found.name} is itself quantized: leave out prefill_weights, or serve its BF16 model.")
        return _folder_beside(found, policy, fetch(prefill_weights))
    made_for = policy or (found.sidecar.policy if found.sidecar else Policy())
    if found.quantized is None:
        return Sources(made_for)
    found.check()
    return with_folder(found.quantized, made_for, found.decode)


def _folder_beside(found: Found, policy: Policy | None, path: Path) -> Sources:
    sidecar = find_sidecar(path)
    if sidecar is not None and sidecar.decode_model is not None:
        sidecar.decode_model.located(path).check(found.download())
    return with_folder(QuantizedFolder(path), policy or (sidecar.policy if sidecar else Policy()))


def with_folder(folder: QuantizedFolder, policy: Policy, decode_model: str | None = None) -> Sources:
    """Sources with quantized weights, which also name the format of a policy that says auto."""
    return Sources(resolve_policy(policy, folder), folder, decode_model)
