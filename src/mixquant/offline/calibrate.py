"""Calibration: what every linear layer's input looks like while the model reads, one decoder layer in memory at a time.

    stream = LayerStream(source, texts, device)
    for unit in layers:
        statistics = stream.advance(unit, hessians=True)

All sequences pass through a decoder layer before the next one is read from the checkpoint. Between layers the hidden
states of the sequences are kept in the model's dtype in main memory; beside them stand one layer and its statistics.
The model's own code runs: its forward, stopped where a layer begins, gives the arguments (masks, rotary embeddings,
positions) with which it calls that layer.

The hidden states are those of the original model, not of its quantized copy. Statistics of the two differ by the
quantization noise, and as it is a layer's result does not depend on how those before it were quantized: a run that
resumes passes finished layers in one forward, and steps can be compared on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixquant.errors import InputError
from mixquant.kernels.dense import use_fastest_linear_
from mixquant.offline.groups import Group
from mixquant.offline.source import Source, Unit
from mixquant.offline.texts import Texts


@dataclass(frozen=True)
class InputStatistics:
    """The input of a group of linear layers over the calibration tokens.

    amax, second_moment: float32 [K], largest magnitude and mean square of each channel. hessian: float32 [K, K], the
    mean of x x^T, if asked for. tokens: what they are means of. held_out: float32 [at most 256, K], the last tokens'
    rows, which the statistics leave out: errors are measured on them.
    """

    amax: Tensor
    second_moment: Tensor
    hessian: Tensor | None
    tokens: int
    held_out: Tensor

    def folded(self, factors: Tensor) -> InputStatistics:
        """The same after the producer was divided by `factors` [K], powers of two; the hessian is changed in place."""
        hessian = self.hessian
        return replace(
            self,
            amax=self.amax / factors,
            second_moment=self.second_moment / factors.square(),
            hessian=None if hessian is None else hessian.div_(factors).div_(factors.unsqueeze(-1)),
            held_out=self.held_out / factors,
        )


class _Tally:
    """Statistics in the making: a forward pre-hook of a linear layer."""

    def __init__(self, hessian: bool) -> None:
        self.with_hessian = hessian
        self.tokens = 0
        self.amax: Any = 0.0
        self.squares: Any = 0.0
        self.products: Tensor | None = None
        self.counted = 0
        """How many rows of the sequence that comes next count; those after them are held out."""
        self.held_out: list[Tensor] = []

    def __call__(self, linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        if self.counted < len(rows):
            self.held_out.append(rows[self.counted :].to(torch.float32, copy=True))
        if self.counted:
            self._count(rows[: self.counted].to(torch.float32))

    def _count(self, rows: Tensor) -> None:
        self.tokens += rows.shape[0]
        self.amax = torch.maximum(rows.abs().amax(0), torch.as_tensor(self.amax, device=rows.device))
        self.squares = self.squares + rows.square().sum(0, dtype=torch.float64)
        if self.with_hessian:
            if self.products is None:
                self.products = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.products.addmm_(rows.T, rows)

    def finish(self, name: str) -> InputStatistics:
        held_out = torch.cat(self.held_out)
        if not all(bool(torch.isfinite(values).all()) for values in (self.squares, held_out)):
            raise InputError(
                f"The input of {name} holds NaN or Inf on the calibration text: use an intact checkpoint, or "
                "quantize without calibration."
            )
        hessian = None if self.products is None else self.products.div_(self.tokens)
        moment = (self.squares / self.tokens).to(torch.float32)
        return InputStatistics(self.amax, moment, hessian, self.tokens, held_out)


class LayerStream:
    """The calibration sequences on their way through the decoder."""

    def __init__(self, source: Source, texts: Texts, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.model = source.model.eval()
        use_fastest_linear_(self.model, device)
        names = [unit.name for unit in source.units if unit.name]
        self.layers = [self.model.get_submodule(name) for name in names]
        self._returns_tuple = False
        for name, module in self.model.named_modules():
            if not any(name == layer or name.startswith(f"{layer}.") for layer in names):
                self._fill(name, module, torch.device("cpu"))
        self.sequences, self.counted = texts.sequences, texts.counted
        self.hidden = [self._call(0, ids)[0].cpu() for ids in self.sequences]

    @torch.no_grad()
    def advance(self, unit: Unit, hessians: bool, watch: bool = True) -> dict[Group, InputStatistics]:
        """Pass all sequences through a decoder layer; the statistics of its groups, or none unless `watch`."""
        layer = self.model.get_submodule(unit.name)
        for name, module in layer.named_modules(prefix=unit.name):
            self._fill(name, module, self.device, required=True)
        tallies = {group: _Tally(hessians) for group in unit.groups if watch}
        hooks = [self.model.get_submodule(g.layers[0]).register_forward_pre_hook(t) for g, t in tallies.items()]
        self._pass(self.layers.index(layer), list(tallies.values()))
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        return {group: tally.finish(group.layers[0]) for group, tally in tallies.items()}

    def _pass(self, index: int, tallies: list[_Tally]) -> None:
        """Replace all hidden states by what layer `index` makes of them."""
        calls: dict[int, tuple[Any, Any]] = {}  # by length: the arguments are the same for all of one length
        for place, ids in enumerate(self.sequences):
            length = ids.shape[1]
            if length not in calls:
                calls[length] = self._to_device(self._call(index, ids)[1:])
            args, kwargs = calls[length]
            for tally in tallies:
                tally.counted = self.counted[place]
            out = self.layers[index](self.hidden[place].to(self.device), *args, **kwargs)
            self._returns_tuple = isinstance(out, tuple)
            self.hidden[place] = (out[0] if self._returns_tuple else out).cpu()

    @torch.no_grad()
    def _call(self, index: int, ids: Tensor) -> tuple[Tensor, Any, Any]:
        """(hidden states, other arguments, keyword arguments) with which the model calls layer `index`.

        Before it, the layers hand on what they get; the hidden states are the model's for index 0 only.
        """
        with self._stopped(index):
            try:
                self.model(input_ids=ids, use_cache=False)
            except _Reached as reached:
                return reached.call
        raise InputError(f"{type(self.model).__name__} does not run its layers in turn: use --calibration none.")

    @contextmanager
    def _stopped(self, index: int) -> Iterator[None]:
        hand_on: Callable[..., Any] = lambda hidden, *_, **__: (hidden,) if self._returns_tuple else hidden  # noqa: E731
        try:
            for layer in self.layers[:index]:
                layer.forward = hand_on
            self.layers[index].forward = _stop
            yield
        finally:
            for layer in self.layers:
                vars(layer).pop("forward", None)  # the class's own again

    def _fill(self, name: str, module: nn.Module, device: torch.device, required: bool = False) -> None:
        """Give a module on the meta device its own tensors: buffers as the model computes them, the rest as stored."""
        buffers = {key: buffer for key, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for key, buffer in buffers.items():
            module._buffers[key] = torch.empty_like(buffer, device=device)
        if buffers:
            self.model._init_weights(module)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            stored = f"{name}.{key}" if name else key
            if stored in self.source.files:
                value = self.source.tensor(stored).to(device, tensor.dtype)
                setattr(module, key, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)
            elif required and isinstance(tensor, nn.Parameter):
                raise InputError(
                    f"{self.source.folder} has no {stored}, which running the model takes: use --calibration none."
                )

    def _to_device(self, arguments: Any) -> Any:
        from accelerate.utils import send_to_device  # type: ignore[import-untyped]

        return send_to_device(arguments, self.device)


class _Reached(Exception):
    """Carries a layer's arguments out of the model's forward."""

    def __init__(self, call: tuple[Tensor, Any, Any]) -> None:
        super().__init__()
        self.call = call


def _stop(hidden: Tensor, *args: Any, **kwargs: Any) -> None:
    raise _Reached((hidden, args, kwargs))
