"""Where the GPU's kernels find a nested weight, in torch's words: what nested_split.cu is compared to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixquant.formats import nested
from mixquant.formats.nested import NestedTensor
from mixquant.kernels.nested import BLOCK
from mixquant.kernels.nested_cuda import LIFT
from mixquant.kernels.nested_split import ROOM, Blocks


def lay_out(weight: NestedTensor) -> Blocks:
    table, more = escapes_by_block(weight)
    room = max(0, weight.plane.numel() // ROOM - len(more))
    return Blocks(weight.plane, weight.scales, interleave(weight.nibbles), table, nn.functional.pad(more, (0, room)))


def interleave(nibbles: Tensor) -> Tensor:
    """Nibbles [N, K/2] by rows, in the order of the kernels' threads: uint8 [K/64, N/16, 32, 16].

    Word i of a thread's four: the columns 2i, 2i+1, 2i+8 and 2i+9 of its 16, a byte each: row g in the lower half, row
    g + 8 in the upper. What is thread 4g + t's stands at 4g + (t ^ g / 2) (`unit` in nested_block.cu).
    """
    n, k = nibbles.shape[0], nibbles.shape[1] * 2
    places = [thread ^ thread // 8 for thread in range(32)]
    single = torch.stack([nibbles & 15, nibbles >> 4], -1)
    tile = single.view(-1, 2, 8, k // BLOCK, 4, 2, 4, 2)  # tile, half of its rows, g, block, t, half, word, byte
    low, high = tile.permute(3, 0, 2, 4, 6, 5, 7, 1).unbind(-1)
    return (low | high << 4).reshape(k // BLOCK, n // 16, 32, 16)[:, :, places]


def escapes_by_block(weight: NestedTensor) -> tuple[Tensor, Tensor]:
    """Escapes by block of 16 x 64 weights: int32 [K/64 * N/16, 4], how many and the first three; and all others, [E].

    An escape is its column in the block << 20 | its row << 16 | its weight's BF16 bits, lifted as the kernels' are. A
    count's upper bits say where a block's others begin.
    """
    n, k = weight.shape
    rows, columns = weight.escapes.rows(), weight.escapes.columns.to(torch.int64)
    values = weight.escaped().to(torch.float64) / (weight.scales[rows, 0].to(torch.float64) * LIFT)
    lifted = values.to(torch.bfloat16)
    assert torch.equal(lifted.to(torch.float64), values)
    bits = lifted.view(torch.int16).to(torch.int32) & 0xFFFF
    escapes = (columns % BLOCK << 20 | rows % nested.TILE << 16).to(torch.int32) | bits
    block, order = (columns // BLOCK * (n // nested.TILE) + rows // nested.TILE).sort(stable=True)
    escapes = escapes[order]
    counts = torch.bincount(block, minlength=n // nested.TILE * (k // BLOCK))
    others = (counts - 3).clamp(min=0)
    table = torch.zeros(len(counts), 4, dtype=torch.int32, device=block.device)
    table[:, 0] = (counts | others.cumsum(0) - others << 11).to(torch.int32)
    index = torch.arange(len(block), device=block.device) - (counts.cumsum(0) - counts)[block]
    first = index < 3
    table[block[first], index[first] + 1] = escapes[first]
    return table, escapes[~first]
