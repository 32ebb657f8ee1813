"""The error of a group of layers is that of a model in which nothing else is quantized, made by other means."""

from __future__ import annotations

import copy
import math
from dataclasses import astuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mixquant
from mixquant.errors import InputError
from mixquant.evaluate.engine import Query
from mixquant.evaluate.metrics import Estimate, estimate, kl_divergence
from mixquant.formats import nvfp4
from mixquant.integrations.transformers.sensitivity import (
    GroupError,
    choose_ignored,
    decoder_layers,
    fused_layers,
    measure,
)
from mixquant.kernels.emulation import EmulatedNVFP4
from mixquant.policy import Policy
from tests.integrations.transformers.reference import FakeQuantLinear

PROMPTS = [[5, 9, 3, 7, 7, 2, 11], [8, 1, 4, 4], [21, 30]]
ANSWERS = [[6, 2, 9], [3, 10, 12, 5, 1], [40]]
QUERIES = [Query("", ids, len(answer)) for ids, answer in zip(PROMPTS, ANSWERS, strict=True)]

ARMS = {"phase": {"prefill": "nvfp4", "tail": 1}, "uniform": {"prefill": "nvfp4", "decode": "nvfp4", "tail": 1}}


def table(model: PreTrainedModel, arm: str = "phase", **options: int) -> dict[str, GroupError]:
    groups = {name: layers for name, layers in fused_layers(model).items() if "layers.1" in name}
    return {group.name: group for group in measure(model, groups, QUERIES, ANSWERS, arm, **options)}


@torch.inference_mode()
def answer_logits(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """One forward over one prompt and its answer, which is declared to be one."""
    with mixquant.prompt_length(model, len(prompt)):
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1]


def test_groups(phase: PreTrainedModel) -> None:
    assert list(decoder_layers(phase)) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert {len(layers) for layers in decoder_layers(phase).values()} == {7}
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert list(fused_layers(phase).items())[:4] == [
        (f"{attention}q_proj+k_proj+v_proj", [f"{attention}{name}_proj" for name in "qkv"]),
        (f"{attention}o_proj", [f"{attention}o_proj"]),
        (f"{mlp}gate_proj+up_proj", [f"{mlp}gate_proj", f"{mlp}up_proj"]),
        (f"{mlp}down_proj", [f"{mlp}down_proj"]),
    ]


@pytest.mark.parametrize("arm", ARMS)
def test_divergence_is_that_of_a_model_that_ignores_all_others(
    plain: PreTrainedModel, phase: PreTrainedModel, arm: str
) -> None:
    """Converted anew with all other layers in `ignore`, one sequence at a time."""
    errors = table(phase, arm)
    precise = mixquant.convert_(copy.deepcopy(plain), "bf16")
    for group in errors.values():
        others = [name for layers in fused_layers(phase).values() for name in layers if name not in group.layers]
        alone = mixquant.convert_(copy.deepcopy(plain), Policy(**ARMS[arm], ignore=others))
        pairs = [
            [answer_logits(m, *example) for m in (precise, alone)] for example in zip(PROMPTS, ANSWERS, strict=True)
        ]
        expected = estimate([float(kl_divergence(*pair).mean()) for pair in pairs])
        assert astuple(group.kld) == pytest.approx(astuple(expected), rel=1e-6)
        assert group.kld.mean > 1e-4
    assert errors != table(phase, "uniform" if arm == "phase" else "phase")


@torch.inference_mode()
def outputs(plain: PreTrainedModel, name: str, part: str) -> tuple[Tensor, Tensor]:
    """(exact, quantized) outputs of a layer for some tokens of every sequence, on the plain model's inputs."""
    layer, rows = plain.get_submodule(name), []
    handle = layer.register_forward_hook(lambda _, inputs, output: rows.append((inputs[0][0], output[0])))
    starts = [len(prompt) - 1 for prompt in PROMPTS]
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        plain(torch.tensor([prompt + answer[:-1]]))
    handle.remove()
    chosen = [
        (x[:start], y[:start]) if part == "prompt" else (x, y) for (x, y), start in zip(rows, starts, strict=True)
    ]
    x, y = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    return y, FakeQuantLinear(layer, "nvfp4")(x)


@pytest.mark.parametrize(("arm", "part"), [("phase", "prompt"), ("uniform", "all")])
def test_signal_to_noise(plain: PreTrainedModel, phase: PreTrainedModel, arm: str, part: str) -> None:
    def share(name: str) -> float:
        exact, quantized = outputs(plain, name, part)
        return float((quantized - exact).square().sum() / exact.square().sum())

    for group in table(phase, arm).values():
        shares = [share(name) for name in group.layers]
        assert group.sqnr_db == pytest.approx(-10 * math.log10(sum(shares) / len(shares)), abs=1e-6)
        assert 10 < group.sqnr_db < 25
    assert table(phase, "phase") != table(phase, "uniform")


def test_batches_and_their_padding_change_nothing(phase: PreTrainedModel) -> None:
    together, alone = table(phase), table(phase, batch=1)
    for name, group in together.items():
        assert astuple(group.kld) == pytest.approx(astuple(alone[name].kld), rel=1e-6)
        assert group.sqnr_db == pytest.approx(alone[name].sqnr_db, abs=1e-9)


def test_the_model_is_left_as_it_was(phase: PreTrainedModel) -> None:
    before = mixquant.explain(phase)
    table(phase)
    assert mixquant.explain(phase) == before


def test_a_spoiled_layer_is_found_and_ignored(plain: PreTrainedModel, phase: PreTrainedModel) -> None:
    """One layer's quantized weight with noise of a fifth of its size: the others hardly differ from each other."""
    spoiled = copy.deepcopy(phase)
    layer = spoiled.model.layers[1].self_attn.o_proj
    weight = plain.model.layers[1].self_attn.o_proj.weight.detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype) * weight.std()
    layer.prefill = EmulatedNVFP4.from_weight(weight + noise, nvfp4.quantize_weight)
    share = weight.numel() / sum(m.weight.numel() for m in plain.modules() if type(m) is torch.nn.Linear)
    errors = measure(spoiled, fused_layers(spoiled), QUERIES, ANSWERS)
    assert choose_ignored(errors, 1.3 * share) == ["model.layers.1.self_attn.o_proj"]
    assert choose_ignored(measure(phase, fused_layers(phase), QUERIES, ANSWERS), 1.3 * share) != [
        "model.layers.1.self_attn.o_proj"
    ]


def group(name: str, kld: float, parameters: int, *more: str) -> GroupError:
    return GroupError(name, (name, *more), parameters, 20.0, Estimate(kld, kld / 10, 8))


TABLE = [
    group("small", 2e-3, 10), group("dense", 1e-3, 2), group("pair", 6e-3, 40, "mate"), group("rest", 1e-3, 18),
    group("last", 1e-4, 30),
]  # fmt: skip


@pytest.mark.parametrize(
    ("share", "chosen"),
    [
        (0.01, []),  # nothing is small enough
        (0.02, ["dense"]),  # the most KLD a weight first
        (0.12, ["dense", "small"]),
        (0.31, ["dense", "small", "rest"]),  # the pair does not fit, and is not split
        (0.52, ["dense", "small", "pair", "mate"]),
    ],
)
def test_what_is_ignored(share: float, chosen: list[str]) -> None:
    assert choose_ignored(TABLE, share) == chosen


@pytest.mark.parametrize("share", [0, 1, -0.1, 10, math.nan])
def test_a_share_of_the_weights(share: float) -> None:
    with pytest.raises(InputError, match=r"share of the weights above 0 and below 1, such as 0\.1, not"):
        choose_ignored(TABLE, share)


def test_a_row_of_the_report() -> None:
    row = group("model.layers.0", 1e-3, 10, "other").to_dict()
    assert row == {
        "layer": "model.layers.0", "kld_mean": 1e-3, "kld_se": 1e-4, "examples": 8, "sqnr_db": 20.0, "parameters": 10,
        "members": ["model.layers.0", "other"],
    }  # fmt: skip
    assert GroupError("one", ("one",), 1, None, estimate([1.0])).to_dict()["kld_se"] is None
