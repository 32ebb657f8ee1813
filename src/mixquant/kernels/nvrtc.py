"""CUDA C++ that ships as source: compiled at first use by NVRTC for the GPU at hand, and launched by the driver.

Why. A wheel with binaries would have to be built for each CUDA and each GPU; a build at install would need nvcc. NVRTC
and `cuda-bindings` come with torch's own CUDA wheels, and a kernel of ours compiles in about a second.
NVRTC needs no GPU, so the tests compile for every architecture that we name.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from mixquant.errors import InputError

Dim3 = tuple[int, int, int]

_THREADS = ThreadPoolExecutor(2, "nvrtc")


def architecture(device: torch.device) -> str:
    """What to compile for. `a` opens what an architecture has for itself, such as Hopper's wgmma."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


@dataclass(frozen=True)
class Compiled:
    """A binary for one architecture. names: what each kernel asked for is called in it. log: ptxas's remarks."""

    binary: bytes
    names: dict[str, str]
    log: str

    def resources(self) -> dict[str, tuple[int, int]]:
        """Registers of a thread and bytes spilled of each kernel, by its name in the binary.

        ValueError for a binary from NVRTC's cache on disk, which has no remarks: CUDA_CACHE_DISABLE=1 leaves it out.
        """
        found = re.findall(r"properties for (\w+)\n.*?(\d+) bytes spill stores.*\n.*?Used (\d+) registers", self.log)
        if not found:
            raise ValueError("what NVRTC takes from its cache has no remarks: set CUDA_CACHE_DISABLE=1")
        return {name: (int(registers), int(spilled)) for name, spilled, registers in found}


def compile_source(files: Sequence[str], kernels: Sequence[str], architecture: str) -> Compiled:
    """Compile source files of this package, one after another as one, for an architecture such as `sm_90a`.

    kernels: the kernels that are wanted, with their template arguments, such as `few_rows<1, 2, 8>`.
    """
    from cuda.bindings import nvrtc

    folder = resources.files("mixquant.kernels")
    source = "\n".join(f'#line 1 "{file}"\n{folder.joinpath(file).read_text()}' for file in files)
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), files[-1].encode(), 0, [], []))
    for kernel in kernels:
        _check(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
    options = [f"-arch={architecture}".encode(), b"--std=c++17", b"--ptxas-options=-v"]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = b" " * _check(nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode(errors="replace")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise InputError(f"{files[-1]} does not compile for {architecture}: report this to mixquant.", text)
    binary = b" " * _check(nvrtc.nvrtcGetCUBINSize(program))
    nvrtc.nvrtcGetCUBIN(program, binary)
    names = {kernel: _check(nvrtc.nvrtcGetLoweredName(program, kernel.encode())).decode() for kernel in kernels}
    return Compiled(binary, names, text)


class Module:
    """Compiled files on one device; their kernels are launched on torch's current stream there."""

    def __init__(self, compiled: Compiled, device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver, self._device = driver, device
        self._starts_early = torch.cuda.get_device_capability(device) >= (9, 0)
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # the driver loads into torch's context, which must exist
            self._module = _check(driver.cuModuleLoadData(compiled.binary))
        self._names = compiled.names
        self._functions: dict[str, Any] = {}

    def function(self, kernel: str, shared_bytes: int) -> Any:
        """A kernel that may take so many bytes of dynamic shared memory."""
        if kernel not in self._functions:
            function = _check(self._driver.cuModuleGetFunction(self._module, self._names[kernel].encode()))
            limit = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(self._driver.cuFuncSetAttribute(function, limit, shared_bytes))
            self._functions[kernel] = function
        return self._functions[kernel]

    def launch(
        self, kernel: str, grid: Dim3, threads: int, shared_bytes: int, *arguments: Any, early: bool = False
    ) -> None:
        """Launch on the current stream; arguments are ctypes values. early: from Hopper on, while the kernel before it
        ends (programmatic dependent launch): one that waits for that itself, `griddepcontrol.wait` in PTX."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        if early and self._starts_early:
            config.attrs, config.numAttrs = [self._early], 1
        with torch.cuda.device(self._device):  # the current device may be another
            function = self.function(kernel, shared_bytes)
            config.hStream = torch.cuda.current_stream().cuda_stream
            launched = self._driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0)
        _check(launched)

    @functools.cached_property
    def _early(self) -> Any:
        attribute, value = self._driver.CUlaunchAttribute(), self._driver.CUlaunchAttributeValue()
        attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        return attribute


@functools.lru_cache(maxsize=1024)
def tensor_map(
    address: int, rows: int, columns: int, width: int, box_rows: int, box_columns: int
) -> ctypes.Array[ctypes.c_uint64]:
    """What Hopper's copy engine must know of a matrix [rows, columns] of BF16 (width 2) or of bytes (1), to copy a box
    of it at once: a kernel's argument of 128 bytes. Copies swizzle units of 16 bytes in rows of 128 bytes, or of 64,
    and read zeros beyond the last row."""
    from cuda.bindings import driver

    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    types, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
    created = _check(
        driver.cuTensorMapEncodeTiled(
            types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if width == 2 else types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            2,
            address,
            [wide(columns), wide(rows)],
            [wide(columns * width)],
            [narrow(box_columns), narrow(box_rows)],
            [narrow(1), narrow(1)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzles.CU_TENSOR_MAP_SWIZZLE_128B if box_columns * width == 128 else swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )
    return (ctypes.c_uint64 * 16)(*(int(word) for word in created.opaque))


@functools.cache
def begin(files: tuple[str, ...], kernels: tuple[str, ...], architecture: str) -> Future[Compiled]:
    """Compile kernels once, on a thread: NVRTC holds no lock of Python's, so a model loads meanwhile."""
    return _THREADS.submit(compile_source, files, kernels, architecture)


@functools.cache
def load(files: tuple[str, ...], kernels: tuple[str, ...], architecture: str, device: torch.device) -> Module:
    """Kernels of some files on a device, compiled and loaded once."""
    return Module(begin(files, kernels, architecture).result(), device)


def _check(answer: tuple[Any, ...]) -> Any:
    """The value of an answer of the bindings, whose first element is a status."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"{type(status).__name__} {status.name}")
    return values[0] if values else None
