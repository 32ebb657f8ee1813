"""Calibration: what every linear layer's input looks like while the model reads, one decoder layer in memory at a time.

    with LayerStream(source, texts, device) as stream:
        for unit in layers:
            statistics = stream.advance(unit, hessians=True)

What: amax, E[x^2] and, for GPTQ, E[x x^T] of each group of layers that read one input.

How: every sequence is one forward of the model's own code, in a thread of its own, that waits where it calls a decoder
layer. `advance` reads one layer from the checkpoint, computes it for each forward, which then runs on to the next one,
and drops the layer's weights. Only one thread runs at a time: they are coroutines, and the model need not know that it
waits. So whatever the model does between its layers, or hands from one to a later one, it does here too.

Trade-off: between layers each sequence keeps its own hidden states, masks and rotary tables, in main memory and in the
model's dtype; beside them stand one layer and its statistics.

The hidden states are those of the original model, not of its quantized copy. The statistics of the two differ by the
quantization noise, but a layer's result does not depend on how those before it were quantized: a run that resumes
passes finished layers in one forward, and steps can be compared on the same inputs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mixquant.errors import InputError
from mixquant.kernels.dense import use_fastest_linear_
from mixquant.offline.calibration_text import Texts
from mixquant.offline.groups import Group
from mixquant.offline.source import Source, Unit

CPU = torch.device("cpu")


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
    """The calibration sequences on their way through the decoder; a context manager, because they wait in threads."""

    def __init__(self, source: Source, texts: Texts, device: torch.device) -> None:
        self.source = source
        self.device = device
        self.model = source.model.eval()
        use_fastest_linear_(self.model, device)
        names = [unit.name for unit in source.units if unit.name]
        self.layers = [self.model.get_submodule(name) for name in names]
        self._compute_buffers()
        for name, module in self.model.named_modules():
            if not any(name == layer or name.startswith(f"{layer}.") for layer in names):
                self._fill(name, module, CPU)
        self._own = [layer.forward for layer in self.layers]
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(self._wait_for, index)
        self.counted = texts.counted
        self._forwards = [
            _Forward(functools.partial(self.model, input_ids=ids, use_cache=False)) for ids in texts.sequences
        ]
        self._running: _Forward

    def __enter__(self) -> LayerStream:
        return self

    def __exit__(self, *_: object) -> None:
        for forward in self._forwards:
            forward.abandon()
        for layer in self.layers:
            vars(layer).pop("forward", None)  # the class's own again

    @torch.no_grad()
    def advance(self, unit: Unit, hessians: bool, watch: bool = True) -> dict[Group, InputStatistics]:
        """Pass all sequences through a decoder layer; the statistics of its groups, or none unless `watch`."""
        layer = self.model.get_submodule(unit.name)
        for name, module in layer.named_modules(prefix=unit.name):
            self._fill(name, module, self.device, required=True)
        tallies = {group: _Tally(hessians) for group in unit.groups if watch}
        hooks = [self.model.get_submodule(g.layers[0]).register_forward_pre_hook(t) for g, t in tallies.items()]
        for forward, counted in zip(self._forwards, self.counted, strict=True):
            for tally in tallies.values():
                tally.counted = counted
            self._pass(forward, self.layers.index(layer))
        for hook in hooks:
            hook.remove()
        layer.to("meta")
        return {group: tally.finish(group.layers[0]) for group, tally in tallies.items()}

    def _pass(self, forward: _Forward, index: int) -> None:
        """Take one forward through layer `index`, for which it must wait."""
        self._running = forward
        if not index:
            forward.run_on()  # from its beginning to the first layer
        if forward.layer != index:
            raise InputError(f"{type(self.model).__name__} does not run its layers in turn: use --calibration none.")
        args, kwargs = forward.call
        out = self._own[index](*_moved(args, self.device), **{k: _moved(v, self.device) for k, v in kwargs.items()})
        if index == len(self.layers) - 1:
            forward.abandon()  # the final norm and the vocabulary are nobody's input
        else:
            forward.run_on(_moved(out, CPU))

    def _wait_for(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """What the model calls, in a forward's thread, in place of layer `index`."""
        return self._running.wait_for(index, args, kwargs)

    def _compute_buffers(self) -> None:
        """Give the model the buffers that no checkpoint has: rotary frequencies, multipliers of channels.

        All at once, because a module may compute those of its children. Parameters, still on the meta device, cost
        nothing here. What nobody computes stays NaN, and is refused as such instead of being anything.
        """
        for module in self.model.modules():
            vars(module).pop("_is_hf_initialized", None)
            for key, buffer in module.named_buffers(recurse=False):
                empty = torch.nan if buffer.is_floating_point() else 0
                module._buffers[key] = torch.full_like(buffer, empty, device=CPU)
        self.model.initialize_weights()

    def _fill(self, name: str, module: nn.Module, device: torch.device, required: bool = False) -> None:
        """Give a module its tensors on `device`: as stored, or the buffers as computed."""
        for key, buffer in module.named_buffers(recurse=False):
            module._buffers[key] = buffer.to(device)
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            stored = f"{name}.{key}" if name else key
            if stored in self.source.headers:
                value = self.source.tensor(stored).to(device, tensor.dtype)
                setattr(module, key, nn.Parameter(value, False) if isinstance(tensor, nn.Parameter) else value)
            elif required and isinstance(tensor, nn.Parameter):
                raise InputError(
                    f"{self.source.folder} has no {stored}, which running the model takes: use --calibration none."
                )


class _Over(BaseException):
    """Ends a forward from within; no `except Exception` of a model may catch it."""


class _Forward:
    """A forward of the model, in a thread that runs only while `run_on` waits for it.

    layer: for which it waits, and call: the arguments that it called it with; None before the first one and at its end.
    What is computed here, in the thread, is what stands between the layers.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.layer: int | None = None
        self.call: Any = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
        self._thread.start()

    def run_on(self, answer: Any = None) -> None:
        """Run, with what the layer returned, until the next layer or the end; what the model raises, this raises."""
        self.layer, self.call, self._answer = None, None, answer
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def wait_for(self, layer: int, args: Any, kwargs: Any) -> Any:
        """Called in the thread: wait for what a layer returns."""
        self.layer, self.call = layer, (args, kwargs)
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Over
        answer, self._answer = self._answer, None
        return answer

    def abandon(self) -> None:
        """Let the thread end, wherever it stands."""
        self.layer, self.call, self._abandoned = None, None, True
        self._go.release()
        self._thread.join()

    def _work(self, run: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():  # each thread has its own gradient mode
                    run()
        except _Over:
            pass
        except BaseException as error:
            self._error = error
        self._stopped.release()


def _moved(value: Any, device: torch.device) -> Any:
    """A layer's arguments on a device. What is no tensor, tuple or list stays itself: later layers may share it."""
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        value.update({key: _moved(item, device) for key, item in value.items()})
    return value
