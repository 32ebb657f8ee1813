"""Rules that choose NVFP4 block scales for weights: amax, and a search around it.

`amax / 6` makes the largest value of a block exact and lets the other fifteen fall where they may. Trying the
E4M3 codes from 8 below to 8 above it, one octave each way, and keeping the one with the least squared error lowers
the weights' relative MSE from 9.05e-3 to 6.6e-3 on Gaussian weights, which equals the search over all 126 codes at a
sixth of its time. Only scale bytes change, so every NVFP4 kernel reads the result.

Weights serve outputs: the error of column j reaches y = x @ weight.T multiplied by x_j. Where calibration knows
E[x_j^2], the search weights the columns by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixquant.formats import nvfp4

RADIUS = 8
_LARGEST_CODE = 0x7E  # 448; 0x7F is NaN


def candidates(weight: Tensor, global_scale: Tensor) -> Tensor:
    """The scales that a search tries, block by block: amax / 6 and its neighbours, nearest first.

    weight: float32 [N, K]; global_scale: float32 []. Returns float8_e4m3fn [17, N, K/16]. A zero block stays zero.
    """
    code = nvfp4.block_scales(weight, global_scale).view(torch.uint8).to(torch.int16)
    offsets = torch.tensor(sorted(range(-RADIUS, RADIUS + 1), key=abs), dtype=torch.int16, device=weight.device)
    codes = (code + offsets.view(-1, 1, 1)).clamp(1, _LARGEST_CODE) * (code != 0)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def search(weight: Tensor, global_scale: Tensor, importance: Tensor | None = None) -> Tensor:
    """The E4M3 scale with the least squared error within +-8 codes of amax / 6, block by block; amax wins ties.

    weight: float32 [N, K]; global_scale: float32 []. importance: float32 [K], the weight of each column's error,
    E[x_j^2] over calibration tokens; None weighs all alike. Returns float8_e4m3fn [N, K/16].
    """
    tried = candidates(weight, global_scale)
    errors = torch.stack([_squared_error(weight, scales, global_scale, importance) for scales in tried])
    best = errors.argmin(0, keepdim=True)  # the first of equals
    return tried.view(torch.uint8).gather(0, best).squeeze(0).view(torch.float8_e4m3fn)


def _squared_error(weight: Tensor, scales: Tensor, global_scale: Tensor, importance: Tensor | None) -> Tensor:
    """Squared quantization error of each block: float32 [N, K/16]."""
    codes = nvfp4.round_e2m1(nvfp4.scaled_values(weight, scales, global_scale))
    step = scales.to(torch.float32) * (1.0 / global_scale)
    squares = (nvfp4.blocks(codes) * step.unsqueeze(-1) - nvfp4.blocks(weight)).square()
    return squares.sum(-1) if importance is None else (squares * nvfp4.blocks(importance)).sum(-1)


RULES: dict[str, nvfp4.ScaleRule] = {"amax": nvfp4.block_scales, "search": search}
"""Scale rules by the name that a policy uses."""
