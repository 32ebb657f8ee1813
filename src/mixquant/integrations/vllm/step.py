"""What the routed layers know of the engine step that runs now, and the form in which a forward computes its rows.

The life of a scheduled token, from vLLM's scheduler to the product that it gets:

    short_prompts.py, once a request    whether its prompt is read precisely
    runner.py    before the forward     three numbers of each request (prompt length, computed, scheduled)
    phase.plan                          -> runs of rows, each of one phase
    StepState    for one step           holds the plan, and the decode rows' indices on the device
    graphs.py    vLLM picks a graph     none that would compute a row by the wrong product
    linear.py    in the forward         the op `mixquant::linear` (moe.py: `mixquant::experts`) finds its RoutedLinear
    routed.py                           asks `StepState.form` and computes the rows in that form:

    form           asked while                                          the layer's rows
    PLANNED        a step's layers run one by one                       each by the product of its phase
    MIXED_GRAPH    a piecewise graph is recorded                        all by the quantized product, and at most
                                                                        `places` once more by the precise one
    DECODE_GRAPH   a full graph is recorded, or a piecewise one for     all by the precise product
                   steps without a prefill row
    DUMMY          a dummy run measures memory, or warms up             as in MIXED_GRAPH: both products do run

While a graph replays nobody asks: the host runs none of the layers. So a piecewise graph reads which rows to compute
precisely from two index buffers, which are written before each step; unused places point at a dump row that nobody
reads. All graphs share the buffers, and one of P places (64, 128, 256 or 512: places.py) reads the first P. Steps that
do not fit are kept from graphs (`piecewise_graph`, `fits_decode_graph`). With `min_prompt`, further piecewise graphs
have ALL places: they hold precise products only, and read no buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode

from mixquant.errors import InputError
from mixquant.integrations.vllm.places import ALL, PLACES, Graphs
from mixquant.integrations.vllm.short_prompts import ShortPrompts
from mixquant.model.linear import PhaseState
from mixquant.phase import Plan, RowCounts

PURE_ROWS = 1024
"""Steps of prompt rows only and more of them run uncaptured: their products hide the launches, and the graph's precise
product would be in vain. Small experts do not hide theirs: there the limit is that of graphs (`moe_defaults`)."""


class Form(Enum):
    """How a routed layer computes the rows of a forward; see the table above."""

    PLANNED = auto()
    MIXED_GRAPH = auto()
    DECODE_GRAPH = auto()
    DUMMY = auto()


@dataclass(eq=False)
class StepState(PhaseState):
    """The plan of the step that runs now, shared by all routed layers of an engine."""

    tail: int = field(kw_only=True)
    short: ShortPrompts = field(default_factory=ShortPrompts)
    rows: RowCounts | None = None
    live: bool = False  # a real step runs: without a plan, no layer may guess
    piecewise: bool = False  # a piecewise graph replays this step
    pure_rows: int = PURE_ROWS
    places: int = PLACES[0]  # of the graph that replays this step, or that is recorded now
    gather: Tensor | None = None  # int64 [PLACES[-1]]: rows that graphs compute precisely; unused: 0
    scatter: Tensor | None = None  # int64 [PLACES[-1]]: the same rows + 1; unused: 0, the dump row
    written: int = 0  # places of the buffers that are in use

    def form(self, mode: CUDAGraphMode, capturing: bool) -> Form:
        """The form of the forward that runs now.

        mode: the graph mode in vLLM's forward context. capturing: whether the device's stream is being captured, which
        vLLM's V2 runner does for full graphs under mode NONE. Raises InputError in a real step that has no plan.
        """
        if mode == CUDAGraphMode.PIECEWISE:  # with a plan or without: later steps replay it under plans of their own
            return Form.DECODE_GRAPH if self.places == ALL else Form.MIXED_GRAPH
        if self.plan is not None:
            return Form.PLANNED
        if self.live:
            raise InputError("A routed layer ran in a step without a plan: report this vLLM version to mixquant.")
        precise = mode == CUDAGraphMode.FULL or capturing or self.places == ALL  # the last one's warm-up
        return Form.DECODE_GRAPH if precise else Form.DUMMY

    def begin(self, plan: Plan, device: torch.device) -> None:
        """Set the plan of the step whose forward comes next, and bring its decode rows to the device."""
        self.plan = plan
        if len(plan.decode_runs) > 1:  # here rather than in the first layer: the copy then overlaps what is before it
            self.decode_rows(device)
        if self.piecewise:
            self.fill()

    def replay(self, places: int | None) -> None:
        """Note the places of the piecewise graph that replays this step, or None if none does. V1 chooses it after
        `begin`, V2 before."""
        self.piecewise = places is not None
        self.places = PLACES[0] if places is None else places
        if self.piecewise and self.plan is not None:
            self.fill()

    def fill(self) -> None:
        """Write the step's decode rows where graphs read them."""
        assert self.plan is not None
        gather, scatter = self.gather, self.scatter
        if gather is None or scatter is None or self.places == ALL or not self.plan.decode_rows:
            return  # no graph holds a routed layer, or the graph chooses nothing: all or none is precise
        rows = self.decode_rows(gather.device)
        assert len(rows) <= self.places  # else the graph would leave rows to the quantized product
        gather[: len(rows)] = rows
        scatter[: len(rows)] = rows + 1
        self.written = max(self.written, len(rows))

    def end(self) -> None:
        """Forget the step. Nothing stale stays in the buffers: a data-parallel rank's dummy step may be shorter."""
        if self.written and self.gather is not None and self.scatter is not None:
            self.gather[: self.written].zero_()
            self.scatter[: self.written].zero_()
        self.plan = self.rows = None
        self.live = self.piecewise = False
        self.places, self.written = PLACES[0], 0

    def buffers(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two index buffers that graphs read, made on first use."""
        if self.gather is None or self.scatter is None:
            self.gather = torch.zeros(PLACES[-1], dtype=torch.int64, device=device)
            self.scatter = torch.zeros(PLACES[-1], dtype=torch.int64, device=device)
        return self.gather, self.scatter

    def tails(self, requests: Sequence[str]) -> list[int]:
        """How many of the last prompt tokens of each request are precise."""
        return self.short.tails(requests, self.tail)

    def piecewise_graph(self, rows: int, graphs: Graphs) -> tuple[int, int] | None:
        """Rows and places of the piecewise graph that computes this step's rows by their phases, where vLLM would take
        one of `rows` rows; None if none does. graphs: those with more places than vLLM's own.

        Dummy runs always fit. While one is recorded, it is the one with the places that are recorded.
        """
        if self.rows is None:
            return rows, self.places if self.places in graphs.places(rows) else PLACES[0]
        if not self.rows.decode and self.rows.prefill > self.pure_rows:
            return None
        if not self.rows.prefill and (graph := graphs.find_precise(rows)):
            return graph
        return graphs.find(rows, self.rows.decode)

    def fits_decode_graph(self) -> bool:
        """Whether a full graph, which holds precise products only, computes this step's rows by their phases."""
        return self.rows is None or self.rows.prefill == 0
