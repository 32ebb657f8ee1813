"""Which arms a run has: by name, as controls, and as any policy."""

from __future__ import annotations

import pytest

from mixquant.errors import InputError
from mixquant.evaluate.arms import Arm, asked, chosen, standard
from mixquant.policy import Policy


def test_a_name_stands_for_its_policy_in_the_format_and_tail_of_the_run() -> None:
    assert standard("uniform", "fp8", tail=4).policy == Policy(prefill="fp8", decode="fp8", tail=4)
    assert standard("decode-only", "int8").policy == Policy(prefill="bf16", decode="int8")
    assert standard("bf16", "nvfp4").quantizes == (False, False)
    assert standard("phase-control", "nvfp4").of == "phase"
    assert standard("phase-control", "nvfp4").policy == standard("phase", "nvfp4").policy


def test_any_policy_is_an_arm() -> None:
    tail64 = Arm(name="tail64", policy=Policy(prefill="nvfp4", tail=64), names_tail=True)
    assert asked("tail64=nvfp4,tail=64") == asked("tail64=nvfp4, tail = 64") == tail64
    assert asked("plain=prefill=fp8,decode=fp8") == Arm(name="plain", policy=Policy(prefill="fp8", decode="fp8"))
    gptq = Arm(name="gptq", policy=Policy(prefill="nvfp4", tail=4), weights="some/folder", names_tail=True)
    assert asked("gptq=nvfp4,weights=some/folder,tail=4") == asked("gptq=nvfp4, weights=some/folder, tail=4") == gptq
    assert asked("a=uniform-int8").quantizes == (True, True)


def test_the_reference_is_first_and_controls_follow_what_they_repeat() -> None:
    arms = chosen(["phase-control", "phase", "bf16-control", "bf16"], ["mine=fp8,tail=2"], "nvfp4", tail=3)
    assert list(arms) == ["bf16", "phase", "bf16-control", "mine", "phase-control"]
    assert [arm.policy.tail for arm in arms.values()] == [3, 3, 3, 2, 3]


def test_an_asked_arm_may_have_a_control() -> None:
    arms = chosen(["bf16", "mine-control"], ["mine=fp8,tail=2"], "nvfp4")
    assert arms["mine-control"].policy == arms["mine"].policy
    assert list(arms) == ["bf16", "mine", "mine-control"]


@pytest.mark.parametrize(
    ("names", "questions", "sentence"),
    [
        (["bf16", "phse"], [], "did you mean phase"),
        (["bf16", "bf16"], [], "An arm is named twice"),
        (["bf16"], ["a=fp8", "a=int8"], "An arm is named twice"),
        (["bf16", "phase-control"], [], "phase-control repeats the arm phase: add that to the arms"),
        (["bf16"], ["phase=fp8"], "The arm phase has its own policy: give yours another name"),
        (["bf16"], ["a-control=fp8"], "give yours another name"),
        (["bf16"], ["a"], "write NAME=POLICY"),
        (["bf16"], ["=fp8"], "write NAME=POLICY"),
        (["bf16"], ["a b=fp8"], "write NAME=POLICY"),
        (["bf16"], ["a/b=fp8"], "write NAME=POLICY"),
        (["bf16"], ["a=fp9"], "The arm a: .*did you mean fp8"),
        (["bf16"], ["a=fp8,tail"], "The arm a: 'tail' in .* sets nothing: write KEY=VALUE"),
        (["bf16"], ["a=fp8,tail=-1"], "The arm a: "),
        (["bf16"], ["a=fp8,tail=1,tail=2"], "The arm a: .* sets tail twice: name it once"),
        (["bf16"], ["a=fp8,weights=one,weights=two"], "The arm a: .* sets weights twice: name it once"),
        (["bf16"], ["a=auto"], "The arm a leaves its format open: name nvfp4, fp8, int8 or bf16"),
    ],
)
def test_what_is_no_arm_is_refused(names: list[str], questions: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        chosen(names, questions, "nvfp4")
