"""The memory bill, before and after conversion, and what explain says."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen3ForCausalLM

import mixquant
from mixquant import kernels
from mixquant.devices import available_bytes
from mixquant.kernels import Accepted
from mixquant.model.explain import is_emulated, kernels_used
from mixquant.policy import PRESETS, QUANTIZED
from tests.conftest import tiny_qwen3

DTYPES = [torch.bfloat16, torch.float32]
NATIVE = any(isinstance(kernels.KERNELS[f][0].check(torch.device("cpu"), torch.bfloat16), Accepted) for f in QUANTIZED)
HERE = [preset for preset in PRESETS if preset != "auto" or NATIVE]
"""`auto` is refused on a CPU without a native quantized kernel (tests/kernels/test_selection.py)."""


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that a converted model holds, found by looking at every attribute of every layer."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for kernel in {id(k): k for k in (getattr(module, "prefill", None), getattr(module, "decode", None))}.values():
            for value in vars(kernel).values() if kernel else ():
                if isinstance(value, torch.Tensor):
                    tensors[id(value) if value.is_mkldnn else value.data_ptr()] = value
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("preset", HERE)
def test_the_bill_before_conversion_is_the_bill_after_it(preset: str, dtype: torch.dtype, tied: bool) -> None:
    original = tiny_qwen3(dtype, tie_word_embeddings=tied)
    with torch.device("meta"):
        shapes = Qwen3ForCausalLM(original.config).to(dtype)
    planned = mixquant.memory(original, preset)
    model = mixquant.convert_(copy.deepcopy(original), preset)
    assert mixquant.memory(model) == planned
    assert mixquant.memory(shapes, preset, device="cpu") == planned
    assert planned.total_bytes == pytest.approx(held_bytes(model), rel=0.02)
    assert planned.original_bytes == pytest.approx(sum(p.nbytes for p in original.parameters()), rel=0.02)


def test_tied_embeddings_are_billed_once() -> None:
    tied, untied = (mixquant.memory(tiny_qwen3(tie_word_embeddings=tie), "nvfp4") for tie in (True, False))
    assert untied.total_bytes - tied.total_bytes == 64 * 64 * 8


def test_weights_shared_in_any_way_are_billed_once() -> None:
    def model() -> nn.Module:
        root = nn.Module()
        root.embed = nn.Embedding(64, 64)
        root.tied_to_embedding, root.first, root.second = (nn.Linear(64, 64, bias=False) for _ in range(3))
        root.tied_to_embedding.weight = root.embed.weight
        root.second.weight = root.first.weight
        root.slices = nn.ParameterList(torch.zeros(2, 8, 64).unbind())  # two views of one storage
        return root

    matrix, slices = 64 * 64 * 4, 2 * 8 * 64 * 4
    bill = mixquant.memory(model(), "nvfp4")
    assert bill == mixquant.memory(mixquant.convert_(model(), "nvfp4"))
    assert bill.original_bytes == bill.decode_bytes == 2 * matrix + slices
    assert bill.prefill_bytes == 2 * matrix  # emulation keeps exact copies in the model's dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantized_copy_costs_what_its_layout_takes(dtype: torch.dtype) -> None:
    original = tiny_qwen3(dtype)
    linears = [m for n, m in original.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    weights = sum(linear.weight.numel() for linear in linears)
    channels = sum(linear.out_features for linear in linears)
    emulated = {"nvfp4": weights * dtype.itemsize, "fp8": weights * dtype.itemsize + 4 * channels}
    for preset, expected in emulated.items():
        assert mixquant.memory(original, preset).prefill_bytes == pytest.approx(expected, rel=0.02)
    bill = mixquant.memory(original, "bf16")
    assert (bill.prefill_bytes, bill.decode_bytes) == (0, bill.original_bytes)
    assert bill.overhead_ratio == 1.0


def test_bill_as_json(phase: PreTrainedModel) -> None:
    bill = mixquant.memory(phase)
    assert bill.to_dict() == {
        "decode_bytes": bill.decode_bytes,
        "prefill_bytes": bill.prefill_bytes,
        "original_bytes": bill.original_bytes,
        "mapped_bytes": 0,
        "freed_bytes": bill.freed_bytes,
        "total_bytes": bill.decode_bytes + bill.prefill_bytes,
        "own_bytes": bill.total_bytes,
        "overhead_ratio": round(bill.total_bytes / bill.original_bytes, 4),
        "layers": 3 * 7,
        "nested_layers": 0,
    }


def test_an_original_model_has_no_overhead(plain: PreTrainedModel) -> None:
    assert mixquant.memory(plain).overhead_ratio == 1.0


def test_explain_names_the_kernel_of_every_layer_and_phase(phase: PreTrainedModel) -> None:
    rows = {row["name"]: row for row in mixquant.explain(phase)}
    assert len(rows) == 3 * 7
    assert rows["model.layers.2.mlp.down_proj"] == {
        "name": "model.layers.2.mlp.down_proj",
        "shape": [64, 128],
        "prefill": {"kernel": "emulation.nvfp4", "format": "nvfp4", "emulated": True},
        "decode": {"kernel": "torch.linear", "format": "bf16", "emulated": False},
    }
    assert kernels_used(phase) == {"prefill": ["emulation.nvfp4"], "decode": ["torch.linear"]}


def test_explain_needs_a_converted_model(plain: PreTrainedModel) -> None:
    with pytest.raises(mixquant.InputError, match="convert_"):
        mixquant.explain(plain)


@pytest.mark.parametrize(("policy", "emulated"), [("nvfp4", True), ("decode-only-fp8", True), ("bf16", False)])
def test_emulation_in_either_phase_is_told(converted: Callable[..., nn.Module], policy: str, emulated: bool) -> None:
    assert is_emulated(converted(policy)) is emulated


def test_available_memory_is_told() -> None:
    free = available_bytes(torch.device("cpu"))
    assert free is None or free > 0


def test_activation_ranges_count_what_the_static_scale_misses(phase: PreTrainedModel) -> None:
    ids = torch.arange(1, 13).unsqueeze(0)
    counts = mixquant.activation_ranges(phase, ids)
    assert set(counts) == {row["name"] for row in mixquant.explain(phase)}
    seen: list[torch.Tensor] = []
    layer = phase.model.layers[1].mlp.down_proj
    with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        phase(ids)
    maxima = seen[0].float().unflatten(-1, (-1, 16)).abs().amax(-1)
    found = counts["model.layers.1.mlp.down_proj"]
    assert found.blocks == maxima.numel()
    assert found.overflow == int((maxima > 672).sum())
    assert found.underflow <= int((maxima < 0.0015).sum())
