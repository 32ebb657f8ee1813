"""PhaseLinear on its own: every row meets the kernel of its phase, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mixquant.errors import InputError
from mixquant.formats import int8
from mixquant.kernels.dense import Dense
from mixquant.kernels.emulation import EmulatedInt8
from mixquant.model.linear import PhaseLinear, PhaseState
from mixquant.phase import DECODE_ONLY, Phase, Plan, Run
from tests.formats.inputs import quick

N, K = 5, 8
PREFILL, DECODE = Phase.PREFILL, Phase.DECODE


class Spy(Dense):
    """A dense kernel that remembers the rows it was given."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self.seen: list[list[int]] = []

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.seen.append(x[:, 0].int().tolist())
        return super().__call__(x, bias)


def integers(*shape: int) -> Tensor:
    """Small integers in float64: every product is exact, so every comparison is `equal`."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(0)).double()


def numbered(rows: int) -> Tensor:
    """Rows that carry their index in column 0."""
    x = integers(rows, K)
    x[:, 0] = torch.arange(rows)
    return x


def layer(uniform: bool = False) -> PhaseLinear:
    """A layer whose prefill kernel is minus twice the decode kernel."""
    weight, bias = integers(N, K), nn.Parameter(integers(N) + 0.5)
    decode = Spy(weight)
    return PhaseLinear(
        "layers.0.up", K, N, prefill=decode if uniform else Spy(-2 * weight), decode=decode, bias=bias,
        dtype=weight.dtype, device=weight.device, state=PhaseState(),
    )  # fmt: skip


def plan_of(pattern: str) -> Plan:
    """A plan from a letter a row: "ppd" is two prefill rows and a decode row."""
    starts = [row for row in range(len(pattern)) if row == 0 or pattern[row] != pattern[row - 1]]
    stops = [*starts[1:], len(pattern)]
    kinds = {"p": PREFILL, "d": DECODE}
    return Plan(tuple(Run(a, b, kinds[pattern[a]]) for a, b in zip(starts, stops, strict=True)))


def expected(linear: PhaseLinear, x: Tensor, pattern: str) -> Tensor:
    """Row by row, by the letter of each."""
    weights = {"p": -2 * linear.decode.weight, "d": linear.decode.weight}
    return torch.stack([weights[letter] @ row + linear.bias for row, letter in zip(x, pattern, strict=True)])


def run(linear: PhaseLinear, pattern: str) -> Tensor:
    linear.state.plan = plan_of(pattern)
    return linear(numbered(len(pattern)))


CASES = {
    "all prefill": "pppp", "all decode": "dddd", "one row": "p", "a prompt and its tail": "pppd",
    "decode first": "ddpp", "interleaved": "dpdpd", "decode around a span": "ddpppdd", "decode inside a span": "pdpddp",
}  # fmt: skip


@pytest.mark.parametrize("pattern", CASES.values(), ids=CASES)
def test_every_row_meets_the_weight_of_its_phase(pattern: str) -> None:
    linear = layer()
    assert torch.equal(run(linear, pattern), expected(linear, numbered(len(pattern)), pattern))


@quick
@given(st.text("pd", min_size=1, max_size=12))
def test_any_pattern_of_phases(pattern: str) -> None:
    linear = layer()
    assert torch.equal(run(linear, pattern), expected(linear, numbered(len(pattern)), pattern))


def test_control_one_row_of_the_other_phase_shows() -> None:
    linear = layer()
    assert not torch.equal(run(linear, "ppdp"), expected(linear, numbered(4), "pppp"))


@pytest.mark.parametrize(
    ("pattern", "prefill", "decode"),
    [
        ("ppp", [[0, 1, 2]], []),
        ("ddd", [], [[0, 1, 2]]),
        ("pppd", [[0, 1, 2, 3]], [[3]]),  # mostly prompt: over all rows
        ("dpdpd", [[1, 2, 3]], [[0, 2, 4]]),  # mostly decode: over the span
    ],
)
def test_prefill_runs_once_and_decode_once_on_its_rows(
    pattern: str, prefill: list[list[int]], decode: list[list[int]]
) -> None:
    linear = layer()
    run(linear, pattern)
    assert linear.prefill.seen == prefill
    assert linear.decode.seen == decode


def test_sequences_flatten_in_the_order_of_the_plan() -> None:
    linear = layer()
    linear.state.plan = plan_of("ppdpdd")
    x = numbered(6).view(2, 3, K)
    out = linear(x)
    assert out.shape == (2, 3, N)
    assert torch.equal(out.view(6, N), expected(linear, x.view(6, K), "ppdpdd"))


def test_decode_only_takes_any_number_of_rows() -> None:
    linear = layer()
    linear.state.plan = DECODE_ONLY
    for rows in (1, 3):
        assert torch.equal(linear(numbered(rows)), expected(linear, numbered(rows), "d" * rows))
    assert linear.prefill.seen == []


@pytest.mark.parametrize("rows", [3, 5])
def test_other_rows_than_the_batch_has_are_refused(rows: int) -> None:
    linear = layer()
    linear.state.plan = plan_of("pppd")
    with pytest.raises(InputError, match=f"got {rows} rows in a batch of 4.*add it to `ignore`"):
        linear(numbered(rows))


def test_called_alone_it_says_whom_to_call() -> None:
    with pytest.raises(InputError, match=r"layers\.0\.up was called outside of the decoder's forward: call the model"):
        layer()(numbered(2))


def test_where_both_phases_share_a_kernel_no_plan_is_needed() -> None:
    linear = layer(uniform=True)
    assert torch.equal(linear(numbered(3)), expected(linear, numbered(3), "ddd"))


# --- a module like nn.Linear ----------------------------------------------------------------------------------------


def test_its_state_dict_is_that_of_the_linear_it_replaces() -> None:
    linear = layer()
    state = linear.state_dict()
    assert list(state) == ["weight", "bias"]
    assert torch.equal(state["weight"], linear.decode.weight)
    plain = nn.Linear(K, N).double()
    plain.load_state_dict(state)
    linear.state.plan = DECODE_ONLY
    assert torch.equal(linear(numbered(3)), plain(numbered(3)))


def test_weight_is_the_checkpoints_own_or_an_error_that_says_why_not() -> None:
    linear = layer()
    assert linear.weight.data_ptr() == linear.decode.weight.data_ptr()
    linear.decode = EmulatedInt8.from_weight(integers(N, K), int8.quantize)
    with pytest.raises(InputError, match="decodes in int8 and keeps no original weight: load the original model"):
        _ = linear.weight


@pytest.mark.parametrize("move", [nn.Module.float, nn.Module.half, nn.Module.bfloat16, lambda m: m.to("meta")])
def test_it_refuses_to_move_or_cast(move: Callable[[nn.Module], nn.Module]) -> None:
    linear = layer()
    with pytest.raises(InputError, match="stays on its device and dtype"):
        move(nn.Sequential(linear))
    assert linear.bias is not None
    assert linear.bias.dtype is torch.float64


@pytest.mark.parametrize("stay", [nn.Module.double, nn.Module.eval, lambda m: m.to("cpu"), lambda m: m.cpu()])
def test_to_where_it_is_already_is_allowed(stay: Callable[[nn.Module], nn.Module]) -> None:
    linear = layer()
    assert stay(nn.Sequential(linear))[0] is linear  # type: ignore[index]


def test_a_copy_shares_kernels_and_has_its_own_plan() -> None:
    linear = layer()
    twin = copy.deepcopy(linear)
    assert twin.prefill is linear.prefill
    assert twin.state is not linear.state
    assert twin.bias is not linear.bias


@pytest.fixture
def compilable(fresh_dynamo: None) -> PhaseLinear:
    """A layer without spies, which Dynamo would have to trace."""
    linear = layer()
    linear.prefill, linear.decode = Dense(linear.prefill.weight), Dense(linear.decode.weight)
    return linear


def test_a_compiled_layer_follows_the_plan(compilable: PhaseLinear) -> None:
    """Graphs that were made under one plan are not used under another."""
    compiled, x = torch.compile(compilable, backend="eager"), numbered(4)
    for pattern in ("dddd", "ppdd", "dddd", "pppp", "dpdp", "dddd"):
        compilable.state.plan = DECODE_ONLY if pattern == "dddd" else plan_of(pattern)
        assert torch.equal(compiled(x), expected(compilable, x, pattern))


def test_a_decode_step_is_one_graph(compilable: PhaseLinear) -> None:
    compiled, x = torch.compile(compilable, backend="eager", fullgraph=True), numbered(4)
    compilable.state.plan = DECODE_ONLY
    assert torch.equal(compiled(x), expected(compilable, x, "dddd"))


def test_control_a_mixed_batch_is_not(compilable: PhaseLinear) -> None:
    compilable.state.plan = plan_of("ppdd")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(compilable, backend="eager", fullgraph=True)(numbered(4))


def test_it_prints_its_kernels() -> None:
    assert repr(layer()) == "PhaseLinear(8, 5, bias=True, prefill=torch.linear, decode=torch.linear)"


WRITES: dict[str, Callable[[PhaseLinear], object]] = {
    "assignment": lambda linear: setattr(linear, "weight", nn.Parameter(torch.zeros(N, K))),
    "data": lambda linear: setattr(linear.weight, "data", torch.zeros(N, K)),
    "data, as PEFT merges": lambda linear: linear.weight.data.add_(1.0),
    "copy_": lambda linear: linear.weight.copy_(torch.zeros(N, K)),
    "augmented": lambda linear: linear.weight.__iadd__(1.0),
    "an item": lambda linear: linear.weight.__setitem__((0, 0), 1.0),
    "a view": lambda linear: linear.weight[0].zero_(),
    "a reshaped view": lambda linear: linear.weight.detach().view(-1).fill_(2.0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_the_weight_is_refused(write: str) -> None:
    linear = layer()
    before = linear.weight.clone()
    with pytest.raises(InputError, match=r"weight cannot be written.*before convert_"), torch.no_grad():
        WRITES[write](linear)
    assert torch.equal(linear.weight, before)


def test_control_what_is_computed_from_the_weight_is_plain() -> None:
    linear = layer()
    for made in (linear.weight * 1.0, linear.weight.clone(), linear.weight.to(torch.float32), linear.weight.sum()):
        assert type(made) is Tensor
        made.add_(1)
    assert type(linear.state_dict()["weight"]) is Tensor
