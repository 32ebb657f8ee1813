"""Which layers quantization hurts most: each group of layers is quantized alone, all others staying precise.

    table = measure(model, decoder_layers(model), queries, answers)      # the report's error by layer
    table = measure(model, fused_layers(model), queries, answers)
    ignore = choose_ignored(table, share=0.1)                            # `mixquant quantize --ignore-worst 0.1`

Two figures a group. SQNR says how well its layers compute: signal over quantization noise of their outputs, on the
precise model's own inputs. KLD says how much that matters: the divergence of the model's answers, forced and run as
decode, from the precise model's, if nothing but this group is quantized. It is the KLD that layers are chosen by.

Groups are measured one at a time, and what they do together is not their sum: a few tokens at which the model hesitates
carry most of the divergence, and one layer's error may undo another's there. The standard error says how far to trust a
figure: with a dozen examples it can be as large as the figure itself, where SQNR hardly moves.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixquant.errors import InputError
from mixquant.evaluate.engine import Query, TokenIds
from mixquant.evaluate.metrics import Estimate, estimate, kl_divergence
from mixquant.formats.error import sqnr
from mixquant.layers import FUSED
from mixquant.model import arms
from mixquant.model.linear import PhaseLinear
from mixquant.phase import Phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mixquant.integrations.transformers.ragged import Ragged


@dataclass(frozen=True)
class GroupError:
    """What quantizing one group of linear layers, and nothing else, does.

    parameters: weights of its layers. sqnr_db: signal over noise of its layers' outputs in the phases that the arm
    quantizes (for several layers, of their mean noise share); None where there is no noise. kld: nats at answer
    positions, a mean over examples.
    """

    name: str
    layers: tuple[str, ...]
    parameters: int
    sqnr_db: float | None
    kld: Estimate

    def to_dict(self) -> dict[str, Any]:
        """A row of the report's `by_layer`."""
        return {
            "layer": self.name, "kld_mean": self.kld.mean, "kld_se": self.kld.se if self.kld.n > 1 else None,
            "examples": self.kld.n, "sqnr_db": self.sqnr_db, "parameters": self.parameters, "members": [*self.layers],
        }  # fmt: skip

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> GroupError:
        """The inverse of `to_dict`."""
        se = math.nan if row["kld_se"] is None else row["kld_se"]
        kld = Estimate(row["kld_mean"], se, row["examples"])
        return cls(row["layer"], tuple(row["members"]), row["parameters"], row["sqnr_db"], kld)


def decoder_layers(model: nn.Module) -> dict[str, list[str]]:
    """The phase-aware layers by the decoder layer they stand in: a name's part up to its first number."""
    return _grouped(model, lambda name: re.sub(r"(\.\d+)\..*", r"\1", name))


def fused_layers(model: nn.Module) -> dict[str, list[str]]:
    """The phase-aware layers by what engines fuse (q, k and v; gate and up), which must be of one precision."""
    return _grouped(model, _fused_name)


def measure(
    model: PreTrainedModel,
    groups: Mapping[str, Sequence[str]],
    queries: Sequence[Query],
    answers: Sequence[TokenIds],
    arm: str = "phase",
    batch: int = 8,
    progress: Callable[[list[slice]], Iterable[slice]] = lambda batches: batches,
) -> list[GroupError]:
    """The error of each group of layers in an arm, in the order of `groups`.

    model: converted to the phase arm of a format. answers: what is forced after each prompt, one token or more.
    progress: wraps the list of batches, for a progress bar. Memory: the logits of one batch, twice.
    """
    noise = _Noise(model, arm)
    reads_anew, _ = arms.quantizes(arm)
    divergences: dict[str, list[float]] = {name: [] for name in groups}
    for part in progress([slice(start, start + batch) for start in range(0, len(queries), batch)]):
        with arms.running(model, arms.REFERENCE):
            read = _read(model, queries[part], noise.counted)
            reference = _logits(model, read, queries[part], answers[part], noise.counted)
        for name, layers in groups.items():
            with arms.running(model, arm, layers=layers):
                state = _read(model, queries[part]) if reads_anew else read
                others = _logits(model, state, queries[part], answers[part])
            divergences[name] += [float(kl_divergence(*pair).mean()) for pair in zip(reference, others, strict=True)]
    return [
        GroupError(name, tuple(layers), noise.parameters(layers), noise.sqnr_db(layers), estimate(divergences[name]))
        for name, layers in groups.items()
    ]


def choose_ignored(table: Iterable[GroupError], share: float) -> list[str]:
    """The layers that stay BF16, by name: the most KLD removed for the prefill work that stays unquantized.

    share: the largest share of the table's weights, and so of their multiplications, that may stay BF16; above 0 and
    below 1. Groups are taken by KLD per weight, whole or not at all; one that no longer fits is passed over.
    """
    check_share(share)
    groups = sorted(table, key=lambda group: group.kld.mean / group.parameters, reverse=True)
    left = share * sum(group.parameters for group in groups)
    chosen: list[str] = []
    for group in groups:
        if group.parameters <= left:
            left -= group.parameters
            chosen += group.layers
    return chosen


def check_share(share: float) -> None:
    """Raise InputError for what is no share of the weights."""
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise InputError(
            f"What may stay BF16 is a share of the weights above 0 and below 1, such as 0.1, not {share!r}."
        )


def _grouped(model: nn.Module, group: Callable[[str], str]) -> dict[str, list[str]]:
    groups = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, PhaseLinear):
            groups[group(name)].append(name)
    return dict(groups)


def _fused_name(layer: str) -> str:
    parent, dot, own = layer.rpartition(".")
    return parent + dot + "+".join(next((names for names in FUSED if own in names), (own,)))


Count = Callable[[Phase, Sequence[TokenIds]], AbstractContextManager[None]]


def _read(
    model: PreTrainedModel, queries: Sequence[Query], counted: Count = lambda phase, tokens: nullcontext()
) -> Ragged:
    """The prompts but for their last tokens, as prefill."""
    from mixquant.integrations.transformers.ragged import prefill

    prompts = [query.ids[:-1] for query in queries]
    with counted(Phase.PREFILL, prompts):
        return prefill(model, prompts)


def _logits(
    model: PreTrainedModel,
    state: Ragged,
    queries: Sequence[Query],
    answers: Sequence[TokenIds],
    counted: Count = lambda phase, tokens: nullcontext(),
) -> list[Tensor]:
    """Logits at each answer's positions, [answer length, vocabulary]; the prompt's last token runs as decode."""
    from mixquant.integrations.transformers.ragged import extend

    forced = [[query.ids[-1], *answer[:-1]] for query, answer in zip(queries, answers, strict=True)]
    with counted(Phase.DECODE, forced):
        logits, _ = extend(model, state, forced)
    return [row[: len(answer)] for row, answer in zip(logits, answers, strict=True)]


class _Noise:
    """Signal and noise of each layer's output, over all tokens whose phase the arm quantizes."""

    def __init__(self, model: nn.Module, arm: str) -> None:
        self._layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, PhaseLinear)}
        self._quantized = {name: layer.prefill for name, layer in self._layers.items()}
        self._counts = dict(zip((Phase.PREFILL, Phase.DECODE), arms.quantizes(arm), strict=True))
        self._signal: dict[str, float] = defaultdict(float)
        self._noise: dict[str, float] = defaultdict(float)

    @contextmanager
    def counted(self, phase: Phase, tokens: Sequence[TokenIds]) -> Iterator[None]:
        """Count during a precise forward over `tokens`, which are padded on the right."""
        layers = self._layers if self._counts[phase] and any(tokens) else {}
        lengths = [len(row) for row in tokens]
        handles = [
            layer.register_forward_hook(functools.partial(self._count, name, lengths)) for name, layer in layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(
        self, name: str, lengths: Sequence[int], layer: PhaseLinear, inputs: tuple[Tensor], output: Tensor
    ) -> None:
        x, y = (tensor.reshape(len(lengths), -1, tensor.shape[-1]) for tensor in (inputs[0], output))
        real = torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
        exact = y[real].double()
        self._signal[name] += float(exact.square().sum())
        self._noise[name] += float((self._quantized[name](x[real], layer.bias) - exact).square().sum())

    def parameters(self, layers: Sequence[str]) -> int:
        """Weights of some layers."""
        return sum(self._layers[name].in_features * self._layers[name].out_features for name in layers)

    def sqnr_db(self, layers: Sequence[str]) -> float | None:
        """Of the mean noise share of some layers."""
        share = math.fsum(self._noise[name] / (self._signal[name] or 1.0) for name in layers) / len(layers)
        return sqnr(share) if share else None
