"""Muon: momentum whose update is made orthogonal, for the 2-D weights of hidden layers.

Jordan et al. 2024. Matrices of one shape are stacked, so a step costs a few batched products
instead of hundreds of small ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch


@torch.compile(dynamic=False)
def orthogonalize(updates: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices, in bfloat16."""
    x = updates.bfloat16()
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: torch.Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        shaped = sorted(params, key=lambda p: tuple(p.shape))
        groups = [{"params": list(same)} for _, same in groupby(shaped, lambda p: tuple(p.shape))]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every group."""
        for group in self.param_groups:
            params = group["params"]
            grads = torch.stack([p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                state["average"] = torch.zeros_like(grads)
            average = state["average"]
            average.lerp_(grads, 1 - group["momentum"])
            update = orthogonalize(grads.lerp(average, group["momentum"]))
            rows, columns = update.shape[-2:]
            scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(params, list(update.to(grads.dtype).unbind()), alpha=scale)
