"""GPTQ on the NVFP4 grid: round one column after another, and let later columns make up for the error of earlier ones.

What. Rounding to nearest minimises |W - Q|^2; the layer's output wants tr((W - Q) H (W - Q)^T) with H = E[x x^T].
How. With H = U D U^T, U unit upper triangular, that objective is the sum over columns j of

    D_j |w_j + sum_{i<j} (w_i - q_i) U_ij - q_j|^2

so each column rounds a target that earlier errors have moved, and its own error counts D_j: what the columns after it
cannot make up for. This is the form of QuIP's LDLQ (Chee et al. 2023, theorem 6), equal to GPTQ (Frantar et al. 2022)
with one Cholesky factorisation and no inverse.
Scales. A block's scale is chosen when its turn comes, on its moved target: all candidates of `scales.search` are
rounded with feedback, and the least objective wins. Scales fixed beforehand by the weighted search cost 8 to 20 % more.
Order. Columns share scales in blocks of 16, so blocks are ordered as wholes, the most powerful input first: a strong
channel's error is made up for by weak ones, at the price of moving them far, and that must not be undone by rounding
strong ones after them. In the model's own order a layer with a few dominant channels ends up worse than by search.
Damping. H comes from finitely many tokens: with two a channel, plain GPTQ fits their noise and does worse on new ones
than the search. K / tokens of each channel's own power is about that noise, and is added; and a hundredth of the mean
power, as everybody does, for what calibration does not show.
Memory. H is ordered and damped where it stands, so one more matrix of its size is all that its factorisation takes;
layers with one input share that. Weights are worked on a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixquant.formats import nvfp4, scales
from mixquant.formats.checks import check_finite, check_matrix, row_chunks, row_slices
from mixquant.formats.nvfp4 import BLOCK, NVFP4Tensor

DAMPING = 0.01


@dataclass(frozen=True)
class Factors:
    """What the inputs say of the columns, which stand in the order in which they are rounded.

    order: of the blocks, int64 [K/16]. feedback: U, float32 [K, K]. importance: D, float32 [K].
    """

    order: Tensor
    feedback: Tensor
    importance: Tensor

    @property
    def columns(self) -> Tensor:
        """The columns in their order, int64 [K]."""
        return _columns(self.order)


def factor_(hessian: Tensor, tokens: int) -> Factors:
    """U and D with U D U^T = H + K/tokens * diag(H) + DAMPING * mean(diag(H)), in units of that mean; overwrites H.

    hessian: float32 [K, K], the mean of x x^T over `tokens` calibration tokens; singular ones and channels that are
    always zero are fine. Should float32 find the sum indefinite all the same, more damping is added until it is not.
    Raises InputError where H holds NaN or Inf.
    """
    check_finite(hessian, "The mean of x x^T")
    order = nvfp4.blocks(hessian.diagonal()).sum(-1).argsort(descending=True, stable=True)
    _reorder_(hessian, _columns(order).flip(0))  # read backwards, Cholesky's lower factor is an upper one
    hessian /= hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    hessian.diagonal().mul_(1.0 + len(hessian) / tokens)
    damping, failed = DAMPING, True
    while failed:
        hessian.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        damping *= 10
    upper = _reverse_(lower.mT.contiguous()).mT
    pivots = upper.diagonal().clone()
    return Factors(order, upper.div_(pivots), pivots.square())


def _columns(order: Tensor) -> Tensor:
    return (order.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=order.device)).flatten()


def _reorder_(matrix: Tensor, order: Tensor) -> None:
    """The same rows and columns in another order, in place."""
    for part in row_slices(*matrix.shape):
        matrix[part] = matrix[part][:, order]
    for part in row_slices(*matrix.shape):
        matrix[:, part] = matrix[:, part][order]


def _reverse_(matrix: Tensor) -> Tensor:
    """A contiguous matrix with both its axes reversed, in place: its numbers backwards."""
    first, last = matrix.view(-1).tensor_split([matrix.numel() // 2])
    for part in row_slices(len(first), 1):
        ahead = first[part]
        behind = last[len(last) - part.start - len(ahead) : len(last) - part.start]
        ahead[:], behind[:] = behind.flip(0), ahead.flip(0)
    return matrix


def quantize(weight: Tensor, factors: Factors, global_scale: Tensor) -> NVFP4Tensor:
    """The weight in NVFP4 with scales and codes chosen for the layer's output.

    weight: [N, K]. factors: of the mean of x x^T. global_scale: float32 []. Raises InputError where K is not a multiple
    of 16 or the weight holds NaN or Inf.
    """
    check_matrix(weight, BLOCK, "NVFP4")
    check_finite(weight, "NVFP4 weight")
    parts = [
        _quantize_rows(rows[:, factors.columns].to(torch.float32), factors, global_scale) for rows in row_chunks(weight)
    ]
    places = factors.order.argsort()
    packed = torch.cat([part.packed for part in parts]).unflatten(1, (len(places), -1))[:, places].flatten(1)
    chosen = torch.cat([part.scales.view(torch.uint8) for part in parts])[:, places].view(torch.float8_e4m3fn)
    return NVFP4Tensor(packed, chosen, global_scale)


def _quantize_rows(weight: Tensor, factors: Factors, global_scale: Tensor) -> NVFP4Tensor:
    """Round some rows [n, K], block after block; rows do not depend on each other."""
    feedback, importance = factors.feedback, factors.importance
    rounded, error, chosen = torch.empty_like(weight), torch.empty_like(weight), []
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        moved = error[:, :start] @ feedback[:start, block]
        scale, rounded[:, block] = _round_block(
            weight[:, block], moved, feedback[block, block], importance[block], global_scale
        )
        error[:, block] = weight[:, block] - rounded[:, block]
        chosen.append(scale)
    return nvfp4.encode(rounded, global_scale, torch.stack(chosen, dim=1))


def _round_block(
    weight: Tensor, moved: Tensor, feedback: Tensor, importance: Tensor, global_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The best scale of each row, float8_e4m3fn [n], and the values [n, 16] that weight + moved then rounds to."""
    target = weight + moved
    tried = scales.candidates(target, global_scale).squeeze(-1)  # [17, n]
    step = tried.to(torch.float32) * (1.0 / global_scale)
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    rounded = torch.empty(BLOCK, *tried.shape, device=weight.device)  # columns first: each is one stretch of memory
    error, objective = torch.empty_like(rounded), torch.zeros_like(step)
    for j in range(BLOCK):
        aim = target[:, j] + torch.tensordot(feedback[:j, j], error[:j], dims=1)
        rounded[j] = nvfp4.round_e2m1(aim * inverse) * step
        error[j] = weight[:, j] - rounded[j]
        objective += importance[j] * (aim - rounded[j]).square()
    best = objective.argmin(0, keepdim=True)
    scale = tried.view(torch.uint8).gather(0, best).squeeze(0).view(torch.float8_e4m3fn)
    return scale, rounded.gather(1, best.expand(BLOCK, 1, -1)).squeeze(1).T
