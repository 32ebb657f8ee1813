"""`mixquant.json`: the policy beside a saved model.

The checkpoint itself stays what every tool reads; nothing of ours goes into config.json, where a Transformers without
mixquant would meet an unknown method, warn, and load something else than was meant.
"""

from __future__ import annotations

import json
from pathlib import Path

from mixquant.errors import InputError
from mixquant.policy import Policy

SIDECAR = "mixquant.json"


def write_policy(folder: str | Path, policy: Policy) -> None:
    """Write the policy into `folder`, beside the model."""
    text = json.dumps({"policy": policy.to_dict()}, indent=2)
    (Path(folder) / SIDECAR).write_text(text + "\n", encoding="utf-8")


def read_policy(folder: str | Path) -> Policy:
    """The policy beside a saved model; InputError where there is none or it is damaged."""
    path = Path(folder) / SIDECAR
    if not path.is_file():
        raise InputError(f"{path} does not exist: save a converted model there first, or name a policy.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))["policy"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged: save the model again, or name a policy.") from None
    return Policy.parse(fields)
