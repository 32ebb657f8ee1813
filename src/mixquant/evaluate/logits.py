"""The reference's logits, kept until the other arms have been compared with them.

Where all arms are open at once that is one batch. Where they come one after another it is all batches, in files beside
the journal, in FP32 as they were computed: positions x vocabulary x 4 bytes, 6 GB for 10,000 answer tokens of a model
with a vocabulary of 150,000. So the free space is checked before the first arm opens, and the next run clears
what a kill leaves.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mixquant.devices import size_text
from mixquant.errors import InputError


class LastLogits:
    """Those of the last batch."""

    def put(self, batch: int, logits: list[Tensor]) -> None:
        self._last = batch, logits

    def get(self, batch: int) -> list[Tensor]:
        number, logits = self._last
        assert number == batch
        return logits


class SavedLogits:
    """Those of all batches, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def opened(self, positions: int, vocabulary: int) -> Iterator[SavedLogits]:
        """Make the folder, and remove it in the end; InputError where so many positions do not fit on its disk."""
        self._clear()
        self._check_space(positions * vocabulary * 4)
        self.folder.mkdir(exist_ok=True)
        try:
            yield self
        finally:
            self._clear()

    def put(self, batch: int, logits: list[Tensor]) -> None:
        try:
            torch.save(logits, self._file(batch))
        except (OSError, RuntimeError) as error:  # torch raises either on a full disk
            raise InputError(
                f"{self.folder} cannot be written ({error}): free space, and run the same again."
            ) from None

    def get(self, batch: int) -> list[Tensor]:
        loaded: list[Tensor] = torch.load(self._file(batch))
        return loaded

    def _file(self, batch: int) -> Path:
        return self.folder / f"{batch}.pt"

    def _clear(self) -> None:
        """Remove what we wrote, and nothing else."""
        if self.folder.is_dir():
            for file in self.folder.glob("[0-9]*.pt"):
                file.unlink()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise InputError(
                f"The reference's logits need up to {size_text(needed)} beside the output, where {size_text(free)} are "
                "free: lower --limit, name fewer tasks, or choose another disk."
            )
