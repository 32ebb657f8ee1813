"""Patterns of layer names: a shell's, or compressed-tensors' regular expressions; one that names nothing is refused."""

from __future__ import annotations

import pytest

from mixquant.errors import InputError
from mixquant.layers import check_patterns, matches

NAMES = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj", "lm_head"]


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("*.o_proj", NAMES[:1]),
        ("re:.*o_proj", NAMES[:1]),
        (r"re:.*layers\.0\..*", NAMES[:2]),
        ("re:layers", []),  # from the beginning, as compressed-tensors matches
        ("o_proj", []),
        ("*.O_PROJ", []),
        ("lm_head", NAMES[2:]),
        ("model.layers.[0].*", NAMES[:2]),
    ],
)
def test_which_layers_a_pattern_names(pattern: str, named: list[str]) -> None:
    assert [name for name in NAMES if matches(name, pattern)] == named
    if named:
        check_patterns([pattern], NAMES)
    else:
        with pytest.raises(InputError, match="No layer is called"):
            check_patterns([pattern], NAMES)


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("o_proj", r"No layer is called 'o_proj', which is to be ignored: did you mean '\*\.o_proj'\?"),
        ("*.oproj", r"did you mean '\*\.o_proj'"),
        ("re:(", r"'re:\(' in `ignore` is no regular expression"),
    ],
)
def test_a_pattern_without_a_layer_is_told_the_nearest(pattern: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        check_patterns([pattern], NAMES)
