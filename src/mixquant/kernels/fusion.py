"""Elementwise chains fused by torch.compile where the device has a compiler, eager (same bits) elsewhere.

Quantizing activations is a chain of small elementwise steps; unfused, each one walks through memory and the chain
can cost as much as the matrix product it feeds. Inductor turns a chain into one loop (C++ on CPU, Triton on CUDA).
`fusion_backend` says what runs here, and `mixquant doctor` prints it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


@functools.cache
def fusion_backend(device_type: str) -> str:
    """`inductor` where torch.compile can build kernels for the device, `eager` otherwise."""
    if device_type not in ("cpu", "cuda"):
        return "eager"
    compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
    if device_type == "cuda":
        compiler = compiler and importlib.util.find_spec("triton") is not None
    return "inductor" if compiler and _compiles(device_type) else "eager"


def _compiles(device_type: str) -> bool:
    """Try it: a compiler may be there without Python's headers, which Inductor and Triton need."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(16, device=device_type))
    except Exception:
        return False
    return True


def fused(function: Callable[..., Result]) -> Callable[..., Result]:
    """Compile `function` on first use, for any number of rows (dimension 0) of its tensor arguments."""

    @functools.cache
    def compiled() -> Callable[..., Result]:
        return torch.compile(function)  # here and not at import: it pulls in the whole compiler

    @functools.wraps(function)
    def call(*args: Tensor | None) -> Result:
        if torch.compiler.is_compiling():  # it is part of a larger graph, which is fused as a whole
            return function(*args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if fusion_backend(tensors[0].device.type) == "eager":
            return function(*args)
        for tensor in tensors:
            if tensor.ndim == 2 and tensor.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled()(*args)

    return call
