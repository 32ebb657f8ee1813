"""The trace that excuses a difference excuses one flipped code and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.integrations.vllm.replay import first_difference

LAYERS = ("first", "second")
ROWS = 6


def activations(seed: int) -> Tensor:
    """[rows, 32] in codes of 1/4 (a block scale of 1 over the global scale of 4), away from every border."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (ROWS, 32), generator=generator).float()
    values[:, ::16] = 6.0
    return values / 4


@pytest.fixture
def inputs() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two equal runs, with a value on each side of the border between the codes 4 and 6, 1e-6 apart."""
    one = {name: activations(seed) for seed, name in enumerate(LAYERS)}
    other = {name: values.clone() for name, values in one.items()}
    one["second"][2, 5], other["second"][2, 5] = (5.0 - 1e-6) / 4, (5.0 + 1e-6) / 4
    return one, other


def test_equal_runs(inputs):
    one, _ = inputs
    assert first_difference(one, one) is None


def test_one_flipped_code(inputs):
    difference = first_difference(*inputs)
    assert (difference.layer, difference.codes, difference.scales) == ("second", 1, 0)
    assert difference.is_one_flip


def test_one_flipped_block_scale(inputs):
    """A block's maximum of 6.375 units lies between the E4M3 scales 1 and 1.125"""
    one, other = inputs
    one["first"][0, 16], other["first"][0, 16] = (6.375 - 1e-6) / 4, (6.375 + 1e-6) / 4
    difference = first_difference(one, other)
    assert (difference.layer, difference.scales) == ("first", 1)
    assert difference.is_one_flip


def test_two_flips_are_no_excuse(inputs):
    one, other = inputs
    one["second"][3, 7], other["second"][3, 7] = one["second"][2, 5], other["second"][2, 5]
    assert not first_difference(one, other).is_one_flip


def test_a_jump_is_no_excuse(inputs):
    one, other = inputs
    other["second"][2, 5] = 6.0 / 4
    assert not first_difference(one, other).is_one_flip


def test_what_is_not_quantized_or_not_computed_does_not_count(inputs):
    """The tail's row, and a row that came from a cache"""
    one, other = inputs
    other["first"][-1] = 0
    other["second"][2] = torch.nan
    assert first_difference(one, other) is None
    assert first_difference(one, other, tail=0).layer == "first"
