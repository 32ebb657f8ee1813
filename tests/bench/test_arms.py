"""Arms: stock ones, named ones, any policy; which of them share an engine."""

from __future__ import annotations

import pytest

from mixquant.bench.arms import chosen, specs
from mixquant.errors import InputError
from mixquant.policy import Policy


def test_bf16_comes_first_and_the_others_in_their_order() -> None:
    found = chosen(["vllm:fp8", "phase", "bf16"], ["mine=int8"], "fp8")
    assert [arm.name for arm in found] == ["bf16", "vllm:fp8", "phase", "mine"]
    assert [arm.spec.policy for arm in found] == [None, None, Policy(prefill="fp8"), Policy(prefill="int8")]
    assert [arm.spec.method for arm in found] == [None, "fp8", None, None]


def test_arms_that_differ_in_their_tail_share_an_engine() -> None:
    found = chosen(["bf16", "phase"], ["t0=fp8,tail=0", "t64=fp8,tail=64", "other=fp8,tail=64,storage=nested"], "fp8")
    assert [arm.tail for arm in found] == [None, None, 0, 64, 64]  # of `phase`: what its engine takes by default
    assert len(specs(found)) == 3
    assert found[1].spec == found[2].spec == found[3].spec != found[4].spec


@pytest.mark.parametrize("policy", ["fp8,tail=32", "fp8, tail=32", "tail =32,prefill=fp8"])
def test_a_named_tail_is_set_though_it_were_the_default(policy: str) -> None:
    assert [arm.tail for arm in chosen(["bf16"], [f"mine={policy}"], "fp8")] == [None, 32]


def test_arms_that_differ_in_min_prompt_have_engines_of_their_own() -> None:
    """It says which graphs are captured; and without it a device's default holds."""
    found = chosen(["bf16", "phase"], ["off=fp8,min_prompt=0", "on=fp8,min_prompt=256"], "fp8")
    assert [arm.spec.policy.min_prompt for arm in found[1:] if arm.spec.policy] == [None, 0, 256]
    assert len({spec.name for spec in specs(found)}) == len(specs(found)) == 4
    assert "min_prompt=0" in found[2].spec.name


def test_an_engine_has_arms_of_its_own() -> None:
    bf16, phase = chosen(["bf16", "phase"], [], "fp8", "transformers")
    assert bf16.spec.name == "transformers"
    assert phase.spec.name.startswith("transformers with mixquant: prefill=fp8, decode=bf16")
    assert not {bf16.spec, phase.spec} & {arm.spec for arm in chosen(["bf16", "phase"], [], "fp8")}
    with pytest.raises(InputError, match="vllm:fp8 is an arm of vLLM"):
        chosen(["bf16", "vllm:fp8"], [], "fp8", "transformers")


def test_a_policy_that_quantizes_nothing_is_stock() -> None:
    bf16, same = chosen(["bf16"], ["same=bf16,tail=4"], "fp8")
    assert bf16.spec == same.spec


@pytest.mark.parametrize(
    ("names", "questions", "said"),
    [
        (["phase"], [], "add bf16 to the arms"),
        (["bf16", "bf16-control"], [], "an arm of `mixquant eval`"),
        (["bf16", "vllm:"], [], "write vllm:fp8"),
        (["bf16", "vllm:fp8", "vllm:fp8"], [], "named twice"),
        (["bf16", "phas"], [], "did you mean phase"),
        (["bf16"], ["x=fp8,tial=3"], "did you mean tail"),
    ],
)
def test_refusals(names: list[str], questions: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        chosen(names, questions, "fp8")
