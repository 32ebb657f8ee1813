"""What a device is: which one a name means, what results call it, what its CPU multiplies, how much memory is free."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mixquant.errors import InputError


def parse_device(name: str | None) -> torch.device:
    """A device by name, by default CUDA where there is one; InputError where it does not exist here, and where a GPU
    would be taken if its driver were not too old."""
    if name is None:
        available = torch.cuda.is_available()
        if not available and (said := _old_driver()):
            raise InputError(said)
        return torch.device("cuda" if available else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InputError(f"Unknown device {name!r}: use cpu or cuda.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise InputError(_old_driver() or f"There is no CUDA device {index or 0} here: use --device cpu.")
    return torch.device(name)


def _old_driver() -> str | None:
    """That the driver is older than torch's CUDA, if it is: torch then sees no GPU at all."""
    built = torch.version.cuda
    # Such as 12040; 0 where there is none. Builds without CUDA have no such function.
    driver = torch._C._cuda_getDriverVersion() if built else 0  # type: ignore[attr-defined]
    if not built or not 0 < driver < int(built.split(".")[0]) * 1000:
        return None
    return (
        f"The NVIDIA driver here is for CUDA {driver // 1000}.{driver % 1000 // 10} and this torch for {built}: update "
        "the driver, install a torch for the driver's CUDA, or use --device cpu."
    )


def device_name(device: torch.device) -> str:
    """What ran: the GPU's name, or the CPU with its widest matrix instructions."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({cpu_isa()}, {torch.get_num_threads()} threads)"


def cpu_isa() -> str:
    """The widest matrix instructions of this CPU: amx, avx512_bf16, avx512_vnni, or none."""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    if torch.cpu._is_avx512_bf16_supported():
        return "avx512_bf16"
    return "avx512_vnni" if torch.cpu._is_vnni_supported() else "none"


def has_bf16() -> bool:
    """Whether this CPU multiplies BF16."""
    return cpu_isa() in ("amx", "avx512_bf16")


def size_text(size: int) -> str:
    """Bytes as GiB with two digits after the point, small ones as MiB."""
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**30 else f"{size / 2**20:,.1f} MiB"


def available_bytes(device: torch.device) -> int | None:
    """Free memory on the device, or None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    host, container = _host_bytes(), _container_bytes()
    return host if host is None or container is None else min(host, container)


def _host_bytes() -> int | None:
    """What Linux could give without swapping: a file of lines such as `MemAvailable:  1234 kB`."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":") for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _container_bytes() -> int | None:
    """What a container's limit (cgroup v2) leaves, of which /proc/meminfo knows nothing; None without a limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else int(limit) - int(used)


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Let this process take at most `more` bytes beyond what it has: past that, Python raises MemoryError.

    For programs that come with models. All threads share the limit while it lasts, so it is for moments. Linux enforces
    it; other systems have no such limit.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    with _LIMITED:
        before, hard = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limits = [pages * resource.getpagesize() + more, before, hard]
        lowest = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (before, hard))


_LIMITED = threading.Lock()
"""Two threads that put each other's limit back would leave one in place."""
