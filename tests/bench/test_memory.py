"""Which engines are resident together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixquant.bench.arms import EngineSpec
from mixquant.bench.memory import OVERHEAD, Sizes, bytes_a_weight, sessions
from mixquant.policy import Policy

GB = 10**9
BF16, STOCK = EngineSpec(), EngineSpec(method="fp8")
PHASE = EngineSpec(policy=Policy(prefill="fp8"))
NESTED = EngineSpec(policy=Policy(prefill="fp8", storage="nested"))
UNIFORM = EngineSpec(policy=Policy(prefill="fp8", decode="fp8"))
SIZES = Sizes(weights=16 * GB, token=10**5, tokens=40_000, device="cuda")


@pytest.mark.parametrize(("spec", "expected"), [(BF16, 2), (STOCK, 1), (PHASE, 3), (NESTED, 1.5), (UNIFORM, 1)])
def test_bytes_of_a_weight(spec: EngineSpec, expected: float) -> None:
    assert bytes_a_weight(spec) == expected


def test_an_engine_takes_weights_cache_and_what_stays_around() -> None:
    assert SIZES.engine(BF16) == 16 * GB + SIZES.cache + OVERHEAD["cuda"]
    assert SIZES.engine(PHASE) == 24 * GB + SIZES.cache + OVERHEAD["cuda"]
    little = replace(SIZES, tokens=100)
    assert little.engine(STOCK) == 16 * GB + OVERHEAD["cuda"]  # while it is loaded, it holds BF16


def test_all_together_where_they_fit() -> None:
    specs = [BF16, STOCK, PHASE]
    assert sessions(specs, SIZES, 200 * GB) == ([specs], {})


def test_groups_each_with_the_yardstick_where_they_do_not() -> None:
    room = int((sum(map(SIZES.engine, (BF16, PHASE))) + GB) / 0.98)
    assert sessions([BF16, PHASE, NESTED], SIZES, room) == ([[BF16, PHASE], [BF16, NESTED]], {})


def test_one_after_the_other_with_the_yardstick_between_where_no_pair_fits() -> None:
    room = int((SIZES.engine(PHASE) + GB) / 0.98)
    assert sessions([BF16, PHASE, NESTED], SIZES, room)[0] == [[BF16], [PHASE], [BF16], [NESTED], [BF16]]


def test_an_arm_that_never_fits_is_refused_and_the_others_go_on() -> None:
    room = int((SIZES.engine(BF16) + GB) / 0.98)
    found, refused = sessions([BF16, PHASE], SIZES, room)
    assert found == [[BF16]]
    assert list(refused) == [PHASE]
    assert "and 25." in refused[PHASE] or "are free" in refused[PHASE]
    assert sessions([BF16], SIZES, GB)[0] == []
