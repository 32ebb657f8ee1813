"""A weight laid out by the GPU's kernel has the bits of `formats.nested` in the layout of `nested_layout`.

Here without a GPU: the kernels' own source, run thread by thread on a CPU (emulator/). `test_cuda` compares on a GPU.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from mixquant.errors import InputError
from mixquant.formats import nested
from mixquant.kernels import nested_split, nvrtc
from mixquant.kernels.nested_split import KERNELS, SOURCES, Blocks
from tests.formats.inputs import same_bits
from tests.formats.test_nested import WEIGHTS
from tests.kernels import emulator, nested_layout
from tests.kernels.emulator import EmulationError, Module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="needs g++ on Linux"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulator.build(tmp_path_factory.mktemp("split"), SOURCES, KERNELS)


@pytest.fixture(autouse=True)
def module(library: Path, monkeypatch: pytest.MonkeyPatch) -> Module:
    """A GPU that is this CPU, and nests whatever has escapes."""
    loaded = Module(library)
    monkeypatch.setattr(nvrtc, "architecture", lambda device: "sm_90a")
    monkeypatch.setattr(nvrtc, "load", lambda *arguments: loaded)
    monkeypatch.setattr(nested, "MOST_ESCAPES", 1.0)
    return loaded


def any_bits(n: int, k: int) -> Tensor:
    """Every finite bit pattern is as likely as any other."""
    bits = torch.randint(0, 0x7F80, (n, k)) | torch.randint(0, 2, (n, k)) << 15
    return bits.to(torch.int16).view(torch.bfloat16)


def around(n: int, k: int, exponent: int) -> Tensor:
    """Any bits whose exponents are within 24 of one: what rounds, what clamps, and what almost does."""
    magnitude = torch.randint(max(0, exponent - 24) << 7, (exponent + 1) << 7, (n, k))
    return (magnitude | torch.randint(0, 2, (n, k)) << 15).to(torch.int16).view(torch.bfloat16)


def all_escape(n: int, k: int) -> Tensor:
    weight = torch.full((n, k), 1.0078125 * 2.0**-24, dtype=torch.bfloat16)
    weight[:, 70 % k] = 1.0
    return weight


FAMILIES = {
    **{name: lambda weight=weight: weight for name, weight in WEIGHTS.items() if name != "one_huge"},
    "a huge one": lambda: torch.cat([torch.full((16, 64), 2.0**-60), torch.full((16, 64), 2.0**30)], 1).bfloat16(),
    "zeros": lambda: torch.tensor([0.0, -0.0]).repeat(16, 32).bfloat16(),
    "every weight but one escapes": lambda: all_escape(32, 192),
    "offset 0": lambda: around(48, 128, 15),
    "offset 1": lambda: around(48, 128, 16),
    "offset 9": lambda: around(48, 128, 24),
    "the middle": lambda: around(272, 320, 126),
    "the lift's end": lambda: around(48, 128, 200),
    "the largest": lambda: around(48, 128, 254),
}


def guarded(module: Module, weight: Tensor) -> Blocks | str:
    """Laid out where all that a kernel writes to stands between pages that nobody may touch."""

    @contextmanager
    def fenced(name: str) -> Iterator[None]:
        made = getattr(torch, name)
        with mock.patch.object(torch, name, lambda *shape, **of: module.guarded(made(*shape, **of))):
            yield

    with fenced("empty"), fenced("zeros"):
        return nested_split.split(module.guarded(weight))


def differing(found: Blocks | str, weight: Tensor) -> list[str]:
    """What is not as the reference has it."""
    assert isinstance(found, Blocks), found
    expected = nested_layout.lay_out(nested.split(weight))
    names = [field.name for field in fields(Blocks)]
    return [name for name in names if not same_bits(getattr(found, name), getattr(expected, name))]


@pytest.mark.parametrize("seed", [0, 3, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_is_the_reference_s(family: str, seed: int, module: Module) -> None:
    torch.manual_seed(seed)
    module.seed = seed
    weight = FAMILIES[family]()
    assert differing(guarded(module, weight), weight) == []


@pytest.mark.parametrize(("n", "k"), [(16, 64), (48, 192), (272, 1088), (16, 4160)])
def test_every_shape_and_any_bits(n: int, k: int, module: Module) -> None:
    """More chunks than a row of CTAs has warps, and tiles that nothing divides."""
    torch.manual_seed(n)
    for module.seed in (1, 4):
        weight = any_bits(n, k).clamp(-2.0, 2.0)  # beside a larger one not all escapes can be lifted
        weight = weight.where(torch.rand(n, 1) < 0.5, around(n, k, 120))
        assert differing(guarded(module, weight), weight) == []


def test_every_magnitude_under_every_offset(module: Module) -> None:
    """Row o has offset o. Below the 25 binades that are tried nothing is left of a weight but an escape."""
    top = (torch.arange(256)[:, None] * 128 + nested.LARGEST).clamp(max=0x7F7F)
    magnitudes = (top - torch.arange(25 * 128)).clamp(min=0)
    weight = (magnitudes | torch.arange(25 * 128) % 3 % 2 << 15).to(torch.int16).view(torch.bfloat16)
    assert nested.offsets(weight)[:241, 0].tolist() == list(range(241))
    assert differing(guarded(module, weight), weight) == []


def test_a_weight_whose_columns_lie_apart_or_at_an_odd_address(module: Module) -> None:
    torch.manual_seed(0)
    weight = around(32, 128, 120)
    apart = torch.stack([weight, weight * 2], -1)[..., 0]
    odd = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(32, 128)
    assert odd.data_ptr() % 16
    assert all(differing(nested_split.split(other), weight) == [] for other in (apart, odd))


@pytest.mark.parametrize("small", [1.5 * 2.0**-33, 2.0**-34, 1.5 * 2.0**-34, 2.0**-35, 2.0**-60])
def test_an_escape_that_cannot_be_lifted_is_refused(small: float) -> None:
    """Beside 2^100 a lifted weight is 2^-99 times as large, and the least number of BF16 is 2^-133."""
    weight = torch.zeros(16, 64, dtype=torch.bfloat16)
    weight[3, 0], weight[3, 1] = 2.0**100, small
    if (small * 2.0**-99) % 2.0**-133 == 0:
        assert differing(nested_split.split(weight), weight) == []
    else:
        with pytest.raises(InputError, match="2\\^133 times smaller"):
            nested_split.split(weight)


def test_too_many_escapes_are_told_as_the_reference_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where some of them could not be lifted."""
    monkeypatch.setattr(nested, "MOST_ESCAPES", 2.0**-7)
    weight = WEIGHTS["one_huge"]
    reason = nested.too_many_escapes(nested.split(weight).escapes.by_tile(), 512)
    assert reason is not None
    assert nested_split.split(weight) == reason


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_weight(value: float) -> None:
    broken = WEIGHTS["gaussian"].clone()
    broken[2, 3] = value
    with pytest.raises(InputError, match="A nested weight holds 1 NaN or Inf"):
        nested_split.split(broken)


def test_more_escapes_than_can_be_found_again_are_refused(module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block's others begin is a number of 21 bits; with more it would be another block's."""
    others = 2 * 1024 - 16 - 2 * 3
    for most in (others, others - 1):
        monkeypatch.setattr(nested_split, "MOST_OTHERS", most)
        if most == others:
            assert differing(nested_split.split(all_escape(16, 128)), all_escape(16, 128)) == []
        else:
            with pytest.raises(InputError, match=f"{others} escapes .* use storage=separate"):
                nested_split.split(all_escape(16, 128))


FAULTS = {
    "a tie is rounded up": ("- 1 + (significand >> shift & 1)", ""),
    "the shift ends too early": ("offset + 1 - exponent, 9u", "offset + 1 - exponent, 8u"),
    "offset 0 has a fixed point of its own": (" || offset == 0) return", ") return"),
    "nibbles of both rows meet": ("c % 2 * 8 + half * 4", "c % 2 * 8"),
    "lower rows come before upper ones": ("(all & 0xFFFF) + (sums >> 16)}", "sums >> 16}"),
    "the sum takes one step too few": ("step < 32; step", "step < 16; step"),
    "others are written where the first three were": ("(entry >> 11) + place - 3", "(entry >> 11) + place"),
    "the sign is lost": ("(bits >> 8 & 0x80)", "0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_control_a_fault_is_found(fault: str, module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weights = around(48, 128, 120), around(48, 128, 7), all_escape(16, 64)
    assert not any(wrong(module, weight) for weight in weights)
    faulty = Module(emulator.build(tmp_path, SOURCES, KERNELS, [FAULTS[fault]]))
    monkeypatch.setattr(nvrtc, "load", lambda *arguments: faulty)
    assert any(wrong(faulty, weight) for weight in weights)


def wrong(module: Module, weight: Tensor) -> bool:
    try:
        return differing(guarded(module, weight), weight) != []
    except (EmulationError, InputError):
        return True
