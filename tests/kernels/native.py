"""A kernel that stands in for a device's own, where there is none."""

from __future__ import annotations

import torch

from mixquant.kernels.nested import EmulatedNested


class Native(EmulatedNested):
    """Of nested weights, and worth it."""

    name = "test.nested"
    emulated = False

    @classmethod
    def default_on(cls, device: torch.device) -> bool:
        return True


class Slow(Native):
    """One that `storage=auto` does without."""

    @classmethod
    def default_on(cls, device: torch.device) -> bool:
        return False
