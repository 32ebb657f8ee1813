"""The table of formats: complete, and its quantizers are those of the modules that define the numbers."""

from __future__ import annotations

import pytest
import torch

from mixquant.errors import InputError
from mixquant.formats import FORMATS, fp8, int8, nvfp4, quantizer, scales
from mixquant.kernels import KERNELS
from mixquant.offline.folder import SCHEMES
from mixquant.policy import QUANTIZED
from tests.formats.inputs import gaussian, same_bits

every_format = pytest.mark.parametrize("format", FORMATS)

MODULES = {"nvfp4": nvfp4.quantize_weight, "fp8": fp8.quantize, "int8": int8.quantize}


def test_every_format_of_a_policy_stands_in_every_table() -> None:
    assert set(FORMATS) == set(QUANTIZED) == set(SCHEMES) == set(KERNELS) - {"bf16"}


@every_format
def test_a_quantizer_is_the_function_of_its_format(format: str) -> None:
    found, same = quantizer(format, "amax")(gaussian()), MODULES[format](gaussian())
    assert all(same_bits(a, b) for a, b in zip(vars(found).values(), vars(same).values(), strict=True))
    assert not torch.equal(found.dequantize(), MODULES[format](gaussian(seed=1)).dequantize())


@every_format
def test_rows_are_the_rows_of_what_all_stand_for(format: str) -> None:
    whole, sample = quantizer(format)(gaussian()), slice(1, None, 3)
    assert torch.equal(whole.rows(sample).dequantize(), whole.dequantize()[sample])
    assert not torch.equal(whole.rows(sample).dequantize(), whole.dequantize()[: len(whole.dequantize()[sample])])


@every_format
def test_k_must_be_the_multiple_that_the_table_says(format: str) -> None:
    multiple = FORMATS[format].multiple
    assert quantizer(format)(gaussian(2, 3 * multiple)).shape == (2, 3 * multiple)
    if multiple > 1:
        with pytest.raises(InputError, match=f"a multiple of {multiple}, not {3 * multiple - 1}"):
            quantizer(format)(gaussian(2, 3 * multiple - 1))


@every_format
def test_a_given_amax_sets_the_global_scale_where_there_is_one(format: str) -> None:
    """A tensor-parallel shard of small values is quantized as it is in the whole weight."""
    whole = torch.cat([gaussian(4, 64), 1e5 * gaussian(4, 64, seed=1)])
    amax = nvfp4.largest_magnitude(whole)
    shard = quantizer(format, amax=amax)(whole[:4])
    assert torch.equal(shard.dequantize(), quantizer(format)(whole).rows(slice(4)).dequantize())
    alone = quantizer(format)(whole[:4])
    assert torch.equal(shard.dequantize(), alone.dequantize()) == (FORMATS[format].block is None)  # control


def test_the_scale_rule_is_chosen_by_name() -> None:
    weight = gaussian()
    found = quantizer("nvfp4", "search")(weight).dequantize()
    assert torch.equal(found, nvfp4.quantize_weight(weight, scales.search).dequantize())
    assert not torch.equal(found, quantizer("nvfp4", "amax")(weight).dequantize())
