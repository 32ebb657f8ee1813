"""Pages of mapped checkpoint files: given back once what they held is in another layout.

Transformers maps a safetensors file and hands out views of it, so a weight that was read stays resident as long as any
other tensor of its file is in use, beside the copy that was made of it. The kernel may drop such pages at any time and
read them again from the file; `release` tells it that now is a good time. Only pages of a file that is mapped are
touched: the same advice for a process's own memory would erase it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

_DONTNEED = 4  # Linux's MADV_DONTNEED


def release(tensor: Tensor) -> None:
    """Give back the pages of a tensor that lies in a mapped safetensors file; of no other tensor."""
    if mapped_bytes([tensor]):
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with a neighbour stay
        length = end // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONTNEED)


def mapped_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of those tensors that lie in mapped safetensors files, each address once; known on Linux alone."""
    if sys.platform != "linux":
        return 0
    files = list(_mapped_files())
    plain = {t.data_ptr(): t.nbytes for t in tensors if t.is_cpu and not t.is_mkldnn and t.is_contiguous()}
    return sum(size for at, size in plain.items() if any(low <= at and at + size <= high for low, high in files))


def _mapped_files() -> Iterator[tuple[int, int]]:
    """Address ranges of mapped safetensors files."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(".safetensors"):
            low, _, high = line.split()[0].partition("-")
            yield int(low, 16), int(high, 16)
