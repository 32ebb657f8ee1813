"""The policy: what it accepts, what it refuses and how it helps."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixquant.errors import InputError
from mixquant.policy import (
    ARMS,
    BY_ROLE,
    CONTROL,
    FORMATS,
    NESTABLE,
    PRESETS,
    QUANTIZED,
    SCALES,
    STORAGES,
    TAIL,
    Policy,
    arm,
)
from tests.formats.inputs import quick

legal = [Policy(prefill=p, decode=d) for p in FORMATS for d in FORMATS if d in ("bf16", p) or p == "bf16"]
policies = st.builds(
    dataclasses.replace,
    st.sampled_from(legal),
    tail=st.integers(0, 1000),
    min_prompt=st.none() | st.integers(0, 1000),
    scales=st.sampled_from(SCALES),
    ignore=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    native=st.booleans(),
    storage=st.sampled_from([storage for storage in STORAGES if storage != "nested"]),
)


def test_a_prefill_server_holds_one_product() -> None:
    held = Policy(prefill="fp8", role="prefill").held
    assert (held.prefill, held.decode, held.tail, held.min_prompt) == ("fp8", "fp8", 0, 0)
    assert Policy(prefill="fp8", role="prefill", min_prompt=0).held == held
    assert Policy(prefill="fp8", tail=4).held == Policy(prefill="fp8", tail=4)
    for other in ({"tail": 4}, {"decode": "fp8"}):
        with pytest.raises(InputError, match=r"in BF16, so decode=.* cannot be: leave both out"):
            Policy(prefill="fp8", role="prefill", **other)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="quantized weights alone, so min_prompt=9 cannot be: leave it out"):
        Policy(prefill="fp8", role="prefill", min_prompt=9)


def test_a_tail_that_nobody_gives_is_its_roles() -> None:
    """A prefill server's decode server reads one prompt token: its policy says so without being told."""
    assert Policy(prefill="fp8").tail == Policy.parse("fp8,storage=nested").tail == TAIL
    pairs = Policy(prefill="fp8", role="prefill")
    assert pairs == Policy(prefill="fp8", role="prefill", tail=1) == Policy.parse("fp8,role=prefill")
    assert pairs == Policy.parse({"prefill": "fp8", "role": "prefill", "tail": None})  # JSON's nothing
    assert dataclasses.replace(Policy(prefill="fp8", tail=4), tail=BY_ROLE) == Policy(prefill="fp8")
    for tail in (0, TAIL):
        with pytest.raises(InputError, match=f"tail={tail} cannot be"):
            Policy(prefill="fp8", role="prefill", tail=tail)


def test_the_default_is_prompts_in_the_fastest_format_and_answers_in_bf16() -> None:
    assert Policy() == Policy(
        prefill="auto", decode="bf16", tail=32, min_prompt=None, scales="search", ignore=(), native=False,
        storage="auto", role="both",
    )  # fmt: skip


@quick
@given(policies)
def test_a_policy_survives_its_json(policy: Policy) -> None:
    assert Policy.parse(json.loads(json.dumps(policy.to_dict()))) == policy
    assert Policy.parse(policy) is policy


@quick
@given(policies, policies)
def test_control_different_policies_have_different_json(one: Policy, other: Policy) -> None:
    assert (one.to_dict() == other.to_dict()) == (one == other)


@pytest.mark.parametrize("prefill", FORMATS)
@pytest.mark.parametrize("decode", FORMATS)
def test_two_quantized_formats_do_not_mix(prefill: str, decode: str) -> None:
    if prefill == "bf16" or decode in ("bf16", prefill):
        policy = Policy(prefill=prefill, decode=decode)
        assert (policy.prefill, policy.decode) == (prefill, decode)
    else:
        with pytest.raises(InputError, match=rf"decode=bf16 .*decode={prefill} .*prefill=bf16"):
            Policy(prefill=prefill, decode=decode)


@pytest.mark.parametrize("policy", legal)
def test_only_fp8_nests(policy: Policy) -> None:
    if (policy.prefill, policy.decode) in NESTABLE:
        assert dataclasses.replace(policy, storage="nested").storage == "nested"
    else:
        remedy = f"not for prefill={policy.prefill}, decode={policy.decode}: use prefill=fp8 .*, or storage=separate"
        with pytest.raises(InputError, match=remedy):
            dataclasses.replace(policy, storage="nested")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("nvpf4", "Unknown policy preset 'nvpf4': did you mean nvfp4?"),
        ("NVFP4", "did you mean nvfp4?"),
        ("uniform_fp8", "did you mean uniform-fp8?"),
        ("decode-int8", "did you mean decode-only-int8?"),
        ({"prefil": "fp8"}, "Unknown policy key 'prefil': did you mean prefill?"),
        ({"tails": 2}, "did you mean tail?"),
        ({"prefill": "fp88"}, "Unknown prefill format 'fp88': did you mean fp8?"),
        ({"decode": "bfp16"}, "Unknown decode format 'bfp16': did you mean bf16?"),
        ({"scales": "serach"}, "Unknown scale rule 'serach': did you mean search?"),
        ({"storage": "nestd"}, "Unknown storage 'nestd': did you mean nested?"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(value: Any, hint: str) -> None:
    with pytest.raises(InputError) as error:
        Policy.parse(value)
    assert hint in str(error.value)
    assert "Valid: " in str(error.value)


@pytest.mark.parametrize("value", ["zzz", {"zzz": 1}, {"prefill": "zzz"}, {"prefill": None}, {"decode": 4}])
def test_a_name_like_no_other_lists_the_valid_ones_without_a_guess(value: Any) -> None:
    with pytest.raises(InputError, match=r"Unknown .*: Valid: ") as error:
        Policy.parse(value)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"tail": -1}, "0 or more, not -1"),
        ({"tail": 1.5}, "0 or more, not 1.5"),
        ({"tail": True}, "0 or more, not True"),
        ({"min_prompt": -1}, "min_prompt is a number of prompt tokens, 0 or more, not -1"),
        ({"min_prompt": 1.5}, "0 or more, not 1.5"),
        ({"min_prompt": True}, "0 or more, not True"),
        ({"ignore": "*.o_proj"}, r'patterns such as \["\*\.o_proj"\]'),
        ({"ignore": [1]}, "patterns such as"),
        ({"ignore": 1}, "patterns such as"),
        ({"native": "no"}, "true or false, not 'no'"),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(fields: dict[str, Any], remedy: str) -> None:
    with pytest.raises(InputError, match=remedy):
        Policy.parse(fields)


@pytest.mark.parametrize("value", [None, 4, ["nvfp4"]])
def test_only_names_and_mappings_are_policies(value: Any) -> None:
    with pytest.raises(InputError, match="a preset's name or a mapping"):
        Policy.parse(value)


def test_a_policy_is_frozen_keyword_only_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().tail = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        Policy("nvfp4")  # type: ignore[misc]
    assert len({Policy(ignore=["a"]), Policy(ignore=("a",)), Policy()}) == 2  # type: ignore[arg-type]


def test_presets_say_what_their_names_say() -> None:
    assert {name: (preset.prefill, preset.decode) for name, preset in PRESETS.items()} == {
        **{format: (format, "bf16") for format in FORMATS},
        **{f"uniform-{format}": (format, format) for format in QUANTIZED},
        **{f"decode-only-{format}": ("bf16", format) for format in QUANTIZED},
    }
    assert all(Policy.parse(name) is preset for name, preset in PRESETS.items())


def test_every_arm_of_every_format_is_a_preset() -> None:
    for format in QUANTIZED:
        assert {arm(name, format) for name in ARMS} <= set(PRESETS.values())
        assert len({arm(name, format) for name in ARMS}) == len(ARMS) - 1
        assert arm(CONTROL, format) == arm("bf16", format)
    assert arm("bf16", "nvfp4") == Policy(prefill="bf16")
    with pytest.raises(InputError, match="did you mean uniform"):
        arm("unifrom", "nvfp4")
