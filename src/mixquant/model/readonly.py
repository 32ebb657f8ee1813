"""The weight of a converted layer, to be read: a write would reach one of its two copies, or neither.

Why. `layer.weight` is the BF16 side's tensor, or is unpacked from it at each access; the quantized copy was made once.
Merging an adapter (PEFT's `weight.data += delta`) would leave the prompt without it, and on a CPU vanish altogether. So
the tensor that a converted layer hands out refuses every write, as do its views; what is computed from it is plain.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mixquant.errors import InputError

WRITTEN = (
    "A converted layer's weight cannot be written, because its quantized copy would keep the old one: change the model "
    "(merge adapters, load weights) before convert_, or load it afresh."
)

_AUGMENTED = "add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift"
_WRITES = re.compile(rf"__set__|__setitem__|__i({_AUGMENTED})__|[^_].*_")
"""Names of tensor methods that write in place: setters, augmented assignments, and torch's trailing underscore."""


class ReadOnly(Tensor):
    """A tensor that raises InputError where it, a view of it or its `.data` is written in place."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], cls) and _WRITES.fullmatch(getattr(func, "__name__", "")):
            raise InputError(WRITTEN)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
            shares = isinstance(out, Tensor) and any(_share(out, arg) for arg in args if isinstance(arg, cls))
            return out.as_subclass(cls) if shares else out


def _share(one: Tensor, other: Tensor) -> bool:
    """Whether one tensor is a view of the other's memory."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
