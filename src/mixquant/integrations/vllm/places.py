"""How many precise rows a captured mixed step holds, and the graphs that vLLM captures more for it.

vLLM captures one piecewise graph for a number of rows. Ours computes all of them by the quantized product and a fixed
number once more by the precise one: its places. A BF16 product of 64 rows costs one read of the weight, like one of
one row, so 64 is what every graph has. Steps with more precise rows, such as a prompt beside 65 conversations, take a
graph of the same number of rows, or of the next larger one, that has 128, 256 or 512.

A step with prompt rows of which none is quantized (`min_prompt`) is no decode step to vLLM. It would run uncaptured,
bound by launches, or pay for quantized products that nobody reads. For these there are graphs whose places are ALL.

Such a graph is told from vLLM's own by one field more of the descriptors that vLLM keys and captures graphs by
(`placed`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig

from mixquant.integrations.vllm.moe_defaults import GRAPH_SIZES

PLACES = (64, 128, 256, 512)
"""Places of graphs; every graph of vLLM's own has the first number."""

ALL = 1 << 20
"""Places of graphs that compute every row precisely, and none by the quantized product: more than a step has rows."""

WIDE_SIZES = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 1280, 1536, 1792, 2048)
"""Rows of the steps that are captured beyond vLLM's largest (`graphs.widen_graphs`): 512 or 1,024, by the GPU, or twice
as many as requests run at once."""

STEPS = (192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, *GRAPH_SIZES)
"""Rows of the graphs with more places, where these are captured; else the next number that is.

Not all of vLLM's 57: a graph costs start-up and memory, a row of padding next to nothing, because up to 2,048 rows a
mixed step is bound by its launches and the reads of its weights. So there are at most 24 more of them (18 where no
step has more than 256 precise rows), up to three more for each size that small experts add (`moe_defaults`), and with
`min_prompt` twelve of `PRECISE_STEPS`, times vLLM's cases of LoRA.
"""

PRECISE_STEPS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Rows of the graphs with ALL places, chosen likewise: a short prompt, beside as many conversations as it has tokens.
Longer steps are bound by reading weights and products, and run uncaptured."""


@dataclass(frozen=True)
class Graphs:
    """The piecewise graphs of one engine that have more places than vLLM's own: their numbers of rows, ascending."""

    rows: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # by places

    @classmethod
    def make(cls, sizes: Collection[int], most: int, short_prompts: bool = False) -> Graphs:
        """sizes: rows of the graphs that vLLM captures itself. most: precise rows that a step can have beside quantized
        ones. short_prompts: there are steps with prompts of which no row is quantized."""
        chosen = _reached(sizes, STEPS)
        graphs = {}
        for fewer, places in itertools.pairwise(PLACES):
            wider = tuple(size for size in chosen if size > places)  # as many rows hold no prompt row beside them
            if most > fewer and wider:
                graphs[places] = wider
        if short_prompts and (reached := _reached(sizes, PRECISE_STEPS)):
            graphs[ALL] = reached
        return cls(graphs)

    def places(self, rows: int) -> list[int]:
        """Places of the additional graphs of `rows` rows, most first."""
        return [places for places in sorted(self.rows, reverse=True) if rows in self.rows[places]]

    def find(self, rows: int, precise: int) -> tuple[int, int] | None:
        """Rows and places of the graph for a step with `precise` rows for which vLLM has a graph of `rows` rows: the
        fewest places, and then the fewest rows. None if no graph holds the step."""
        if precise <= PLACES[0]:
            return rows, PLACES[0]
        places = next((places for places in PLACES if places >= precise), None)
        wide = next((size for size in self.rows.get(places or 0, ()) if size >= rows), None)
        return None if places is None or wide is None else (wide, places)

    def find_precise(self, rows: int) -> tuple[int, int] | None:
        """Rows and places of the graph for a step without a prefill row; None if there is none for it."""
        size = next((size for size in self.rows.get(ALL, ()) if size >= rows), None)
        return None if size is None else (size, ALL)


def _reached(sizes: Collection[int], steps: Iterable[int]) -> tuple[int, ...]:
    """For each step the next of the sizes that holds it, if one does; each once, ascending."""
    found = (min((size for size in sizes if size >= step), default=None) for step in steps)
    return tuple(sorted({size for size in found if size is not None}))


def graphs_for(config: VllmConfig, sizes: Collection[int], tail: int, min_prompt: int = 0) -> Graphs:
    """The additional graphs of an engine whose own piecewise graphs have these numbers of rows."""
    if config.parallel_config.data_parallel_size > 1:
        return Graphs()  # ranks agree on the rows of a step and not on its phases: none may pad further by itself
    a_request = max(tail, 1 + config.num_speculative_tokens, min_prompt - 1)
    return Graphs.make(sizes, config.scheduler_config.max_num_seqs * a_request, min_prompt > 0)


def with_places(descriptors: Iterable[Any], graphs: Graphs) -> list[Any]:
    """vLLM's descriptors in its own order of capture, from large to small, with the additional ones: of equal rows,
    the most places first, since all graphs share one pool of memory."""
    return [
        each
        for descriptor in descriptors
        for each in (*(placed(descriptor, places) for places in graphs.places(descriptor.num_tokens)), descriptor)
    ]


def placed(descriptor: Any, places: int) -> Any:
    """A descriptor of vLLM's for a graph with so many places. With vLLM's own number of them it stays as it is; any
    other is equal to none of vLLM's, and so names another graph."""
    if places == PLACES[0]:
        return descriptor
    fields = {field.name: getattr(descriptor, field.name) for field in dataclasses.fields(descriptor)}
    kind: Any = type(descriptor)
    return _placed_kind(kind)(**fields | {"places": places})


def places_of(descriptor: Any) -> int:
    """Places of the graph that a descriptor names."""
    places: int = getattr(descriptor, "places", PLACES[0])
    return places


@functools.cache
def _placed_kind(kind: type) -> type:
    """A frozen dataclass of vLLM's with one field more, which takes part in equality and hash."""
    return dataclasses.make_dataclass(
        f"Placed{kind.__name__}", [("places", int, PLACES[0])], bases=(kind,), frozen=True
    )
