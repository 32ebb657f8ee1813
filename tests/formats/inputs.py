"""Matrices on which quantizers differ where they are wrong, and what tests need to compare bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

ROWS, K = 32, 256
E2M1_TIES = tuple(sign * tie for tie in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0) for sign in (1, -1))
ABOVE = 1.0 + 2.0**-23  # times a power of two: the float32 next to it

quick = settings(max_examples=60, deadline=None, derandomize=True)
"""Property tests: the same examples in every run, without a clock."""


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: unlike `==`, they tell -0 from 0 and know NaN."""
    return torch.atleast_1d(x.contiguous()).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def gaussian(rows: int = ROWS, k: int = K, seed: int = 0) -> Tensor:
    return torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))


def student_t3() -> Tensor:
    """Heavy tails: a Gaussian over the root of a chi-squared of three degrees of freedom."""
    return gaussian() / torch.stack([gaussian(seed=s) for s in (1, 2, 3)]).square().mean(0).sqrt()


def outlier_channel() -> Tensor:
    """One column a thousand times larger than the others."""
    x = gaussian()
    x[:, 37] *= 1000.0
    return x


def tiny_blocks() -> Tensor:
    """Each row 4 times smaller than the one above: block scales turn subnormal, then vanish."""
    return gaussian() * 4.0 ** -torch.arange(ROWS)[:, None]


def zero_blocks() -> Tensor:
    """Blocks of zeros, of minus zeros, and of tiny values under a zero scale."""
    x = gaussian()
    x[:, 0:16] = 0.0
    x[:, 16:32] = -0.0
    x[:, 32:48] *= 1e-12
    return x


def e2m1_ties() -> Tensor:
    """Exactly between two codes, in blocks whose scales are powers of two; some are one unit above or below."""
    x = _picks(torch.tensor([tie * off for tie in E2M1_TIES for off in (1.0, ABOVE, 1.0 / ABOVE)]))
    x[:, ::16] = 6.0
    return x * 2.0 ** torch.arange(-3, 5).repeat(ROWS // 8)[:, None]


def scale_ties() -> Tensor:
    """Block maxima whose sixth lies exactly between two E4M3 scales, or, every other row, as close as floats come."""
    block = torch.arange(ROWS * K // 16).reshape(ROWS, -1)
    maxima = 6.0 * (1.0 + (2 * (block % 8) + 1) / 16.0) * 2.0 ** (block // 8 % 8 - 4)
    maxima[1::2] = torch.nextafter(maxima[1::2], torch.zeros(()))
    x = 2.0**-5 * gaussian()
    x[:, ::16] = maxima
    return x


def row_ties(codes: Tensor) -> Tensor:
    """Between two of the ascending codes that a row has, under odd scales: the last bit of a quotient decides."""
    x = _picks((codes[1:] + codes[:-1]) / 2)
    x[:, 0] = codes[-1]
    return x * gaussian(ROWS, 1).exp()


def _picks(values: Tensor) -> Tensor:
    return values[torch.randint(len(values), (ROWS, K), generator=torch.Generator().manual_seed(0))]


INPUTS: dict[str, Callable[[], Tensor]] = {
    "gaussian": gaussian,
    "gaussian_bf16": lambda: gaussian().bfloat16(),
    "student_t3_bf16": lambda: student_t3().bfloat16(),
    "outlier_channel": outlier_channel,
    "tiny_blocks": tiny_blocks,
    "zero_blocks": zero_blocks,
    "all_zero": lambda: torch.zeros(ROWS, K),
    "e2m1_ties": e2m1_ties,
    "scale_ties": scale_ties,
    "fp8_ties": lambda: row_ties(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()),
    "int8_ties": lambda: row_ties(torch.arange(-127.0, 128.0)),
}
"""Matrices [ROWS, K] by name."""


_values = st.floats(-1e6, 1e6, width=32) | st.builds(
    lambda value, exponent: value * 2.0**exponent, st.sampled_from((*E2M1_TIES, 6.0)), st.integers(-20, 10)
)


def matrices(multiple: int = 16) -> st.SearchStrategy[Tensor]:
    """Any finite matrix of 1 to 4 rows up to a million: zeros of both signs, subnormals, ties and all."""
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 3).map(multiple.__mul__))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=_values)).map(torch.from_numpy)
