"""Channel folding: move a power of two per channel from a group's input into its weights, exactly.

    x @ W.T  =  (x / f) @ (W * f).T

What. Sixteen neighbours share a scale, in the weights and in the activations: a channel thirty times larger than its
neighbours rounds them away. Folding divides the input's channel j by f_j and multiplies the weights' column by it; the
producer of the input (a norm, v_proj, up_proj) takes the division into its own parameters, so nothing runs that did
not run before. f = (E[x^2] / E[w^2])^(1/4) gives both sides the same spread, and none the whole of it.
Exact. f is a power of two: every product, sum and rounding after it is the old one times a power of two, as long as
values stay in the normal range. A channel that would leave it keeps the factor 1. So the folded model gives the same
output bit for bit, in BF16 and FP32, on any engine. (BF16 has the exponents of FP32; float16 models hardly fold.)
What changes. The KV cache holds v / f: a folded prefill side needs the folded decode model beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats.checks import row_chunks, row_slices
from mixquant.offline.groups import Group


def factors(tensors: Mapping[str, Tensor], group: Group, second_moment: Tensor) -> Tensor:
    """The factor of each input channel: float32 [K], powers of two around 1, equal over repeated heads.

    tensors: the decoder layer's parameters by full name; read, not changed. second_moment: float32 [K], E[x_j^2] of the
    group's input. A channel that is zero on either side gets 1. Raises InputError for a group that does not fold.
    """
    if group.producer is None:
        raise InputError(f"{group.layers[0]} does not fold ({group.reason}): quantize it without folding.")
    power = _column_power([tensors[f"{layer}.weight"] for layer in group.layers])
    x, w = _per_channel(second_moment, group).mean(1), _per_channel(power, group).mean(1)
    alive = (x > 0) & (w > 0)
    exponents = torch.where(alive, (x.log2() - w.log2()) / 4, 0.0)
    exponents -= exponents.sum() / alive.sum().clamp_min(1)
    chosen = _per_input(torch.where(alive, exponents.round(), 0.0).exp2(), group)
    return torch.where(_stays_normal(tensors, group, chosen), chosen, 1.0)


def apply_(tensors: MutableMapping[str, Tensor], group: Group, factors: Tensor) -> None:
    """Multiply the columns of the group's weights by `factors` [K] and divide its producer's parameters, in place."""
    for layer in group.layers:
        for rows in row_chunks(tensors[f"{layer}.weight"]):
            rows.mul_(factors)
    divisors = _per_channel(factors, group)[:, :1].reshape(-1, 1)
    for parameter in _producer_parameters(tensors, group):
        for part in row_slices(*parameter.shape):
            parameter[part].div_(divisors[part])


def _column_power(weights: Sequence[Tensor]) -> Tensor:
    """Mean square of each column over the rows of all weights: float32 [K]."""
    squares = [rows.to(torch.float32).square().sum(0, dtype=torch.float64) for w in weights for rows in row_chunks(w)]
    return (torch.stack(squares).sum(0) / sum(len(weight) for weight in weights)).to(torch.float32)


def _stays_normal(tensors: Mapping[str, Tensor], group: Group, factors: Tensor) -> Tensor:
    """For which input channels [K] all that `apply_` changes is zero or normal, before and after."""
    fits = torch.ones_like(factors, dtype=torch.bool)
    for layer in group.layers:
        for rows in row_chunks(tensors[f"{layer}.weight"]):
            fits &= (_normal(rows, rows.dtype) & _normal(rows * factors, rows.dtype)).all(0)
    fits = _per_channel(fits, group).all(1)
    divisors = _per_channel(factors, group)[:, :1].reshape(-1, 1)
    for parameter in _producer_parameters(tensors, group):
        parts = [(parameter[part], divisors[part]) for part in row_slices(*parameter.shape)]
        kept = [(_normal(p, p.dtype) & _normal(p / divisor, p.dtype)).all(1) for p, divisor in parts]
        fits &= torch.cat(kept).view_as(fits)
    return _per_input(fits, group)


def _normal(values: Tensor, dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(dtype)
    size = values.abs()
    return (size == 0) | ((size >= limits.smallest_normal) & (size <= limits.max))


def _producer_parameters(tensors: Mapping[str, Tensor], group: Group) -> list[Tensor]:
    """The producer's weight and bias, as far as it has them, as views [channels, ...]."""
    names = (f"{group.producer}.weight", f"{group.producer}.bias")
    return [tensors[name].view(len(tensors[name]), -1) for name in names if name in tensors]


def _per_channel(values: Tensor, group: Group) -> Tensor:
    """Values [K] of the input as [runs, repeats, run]: one producer channel per run and place in it."""
    return values.view(-1, group.repeats, group.run)


def _per_input(values: Tensor, group: Group) -> Tensor:
    """Values [runs, run] of the producer's channels, repeated for the input: [K]."""
    return values.unsqueeze(1).expand(-1, group.repeats, -1).flatten()
