"""A GPU on a CPU: the kernels' own source, compiled by g++, and executed thread by thread.

    source      `nvrtc.compile_source`'s files as they are. An inline `asm` becomes one call for each of its
                instructions, of a function of that name in ptx.h: what is not there does not compile.
    threads     fibers (fibers.h). A seed decides their order, and when copies and wgmma get done: between being asked
                for and being waited for.
    launch      as `nvrtc.Module` does it, with the arguments that `NestedCUDA` gives it (launch.h)

What it finds: a wait that is missing or never ends, by some seeds; memory that is not the kernel's; an mbarrier that
is overwritten, not fenced or arrived at too often; registers that setmaxnreg would wait for; lanes of a warp that are
not at the same instruction; x that is read before the wait for the kernel before.
What it cannot: time; y that is written before that wait; what NVRTC makes of the source, such as whether it brings a
warp's lanes together again; a race between what two threads do without pausing between barriers, if it shows in neither
of their orders; writes that are
done but not yet visible to others (but for mbarriers and wgmma, fences do nothing); the order and rounding of a tensor
core's sums; and all that this reading of the PTX ISA has wrong.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import subprocess
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixquant.kernels import nvrtc

HERE = Path(__file__).parent
FLAGS = (
    *("-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing"),
    "-U_FORTIFY_SOURCE",
)
"""Without the check that `longjmp` only goes up its own stack: fibers go across."""
TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[():,]|[^"():,]+')
KERNEL = re.compile(
    r"(template <[^<>]*>\s*)?__global__ void\s+"
    r"(?:__cluster_dims__\(([^()]*)\)\s*)?__launch_bounds__\(([^()]*)\)\s*(\w+)"
)
SHARED = re.compile(r"extern __shared__\s+(?:__align__\(\d+\)\s+)?(\w+) (\w+)\[\];")


class EmulationError(Exception):
    """What a GPU would not have done, or what nobody can say what it would have done."""


class Module:
    """What `nvrtc.Module` is for a GPU.

    seed: of the order in which threads run, and of when copies and wgmma are done; eight of them differ in kind.
    """

    def __init__(self, library: Path, seed: int = 0) -> None:
        self.library, self.seed = ctypes.CDLL(str(library)), seed
        self.library.launch.restype = ctypes.c_char_p
        self.library.guarded.restype = ctypes.c_void_p

    def launch(
        self, kernel: str, grid: nvrtc.Dim3, threads: int, shared_bytes: int, *arguments: Any, early: bool = False
    ) -> None:
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        grid_of_launch = (ctypes.c_uint * 3)(*grid)
        wrong = self.library.launch(kernel.encode(), grid_of_launch, threads, shared_bytes, pointers, self.seed, early)
        if wrong is not None:
            raise EmulationError(f"{kernel}: {wrong.decode()}")

    def guarded(self, tensor: Tensor) -> Tensor:
        """A copy between pages that nobody may touch."""
        if not tensor.numel():
            return tensor
        size = tensor.numel() * tensor.element_size()
        room = (ctypes.c_uint8 * size).from_address(self.library.guarded(ctypes.c_size_t(size)))
        copy = torch.frombuffer(room, dtype=tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)


def tensor_map(address: int, *extents: int) -> ctypes.Array[ctypes.c_uint64]:
    """`nvrtc.tensor_map`, as ptx.h reads it: address, rows, columns, width, box_rows, box_columns."""
    return (ctypes.c_uint64 * 16)(address, *extents)


def build(folder: Path, files: Sequence[str], kernels: Sequence[str], edits: Sequence[tuple[str, str]] = ()) -> Path:
    """Compile source files of `mixquant.kernels`, with the kernels that are wanted, for `Module`.

    edits: what to replace in the source by what, each found once: a control's fault.
    """
    package = resources.files("mixquant.kernels")
    source = "\n".join(package.joinpath(file).read_text() for file in files)
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"{source.count(old)} times in the source: {old}")
        source = source.replace(old, new)
    expanded = _run(["g++", "-std=c++20", "-E", "-P", "-D__CUDA_ARCH__=900", "-x", "c++", "-"], folder, source)
    table = "".join(f'{{"{name}", {{bounds_of_{name}, [](void** p) {{ call({name}, p); }}}}}},\n' for name in kernels)
    whole = (
        "".join(f'#include "{HERE / name}"\n' for name in ("fibers.h", "ptx.h", "launch.h"))
        + translate(expanded)
        + f"\nconst std::map<std::string, Kernel> kernels{{\n{table}}};\n"
    )
    (folder / "kernels.cpp").write_text(whole)
    _run(["g++", *FLAGS, "-o", "kernels.so", "kernels.cpp"], folder)
    return folder / "kernels.so"


def _run(command: list[str], folder: Path, text: str | None = None) -> str:
    ran = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise EmulationError(ran.stderr[:4000])
    return ran.stdout


def translate(source: str) -> str:
    """CUDA C++, preprocessed, as C++ that has the functions of ptx.h."""
    source = SHARED.sub(r"\1* const \2 = (\1*)dynamic_shared();", source)
    source = KERNEL.sub(_kernel, source)
    parts, end = [], 0
    for found in re.finditer(r"\basm\b(?:\s+volatile)?\s*\(", source):
        statement, after = _statement(source, found.end())
        parts += [source[end : found.start()], statement]
        end = after
    return "".join([*parts, source[end:]])


def _kernel(found: re.Match[str]) -> str:
    """A kernel, and beside it what its attributes say."""
    template, cluster, bounds, name = found.groups("")
    threads, _, beside = bounds.partition(",")
    constant = f"{{{{{cluster or '1, 1, 1'}}}, {threads}, {beside or '1'}}}"
    return f"{template}constexpr Bounds bounds_of_{name}{constant};\n{template}void {name}"


def _statement(source: str, start: int) -> tuple[str, int]:
    """The calls that an asm statement becomes, whose parentheses open before `start`, and where they close."""
    sections: list[list[str]] = [[""]]  # template, outputs, inputs, clobbers; each of operands
    depth, at = 0, start
    for token in TOKEN.finditer(source, start):
        text, at = token.group(), token.end()
        depth += (text == "(") - (text == ")")
        if depth < 0:
            break
        if depth == 0 and text == ":":
            sections.append([""])
        elif depth == 0 and text == ",":
            sections[-1].append("")
        else:
            sections[-1][-1] += text
    template = "".join(re.findall(r'"((?:\\.|[^"\\])*)"', sections[0][0]))
    operands = [re.sub(r'^\s*"[^"]*"\s*', "", text) for section in sections[1:3] for text in section if text.strip()]
    instructions = template.replace(r"\n", " ").replace(r"\t", " ").split(";")
    calls = itertools.chain.from_iterable(_instruction(text.strip(), operands) for text in instructions)
    return f"do {{ {' '.join(calls)} }} while (0)", at


def _instruction(text: str, operands: list[str]) -> Iterator[str]:
    """One instruction of PTX as C++."""
    if text.startswith("{") or text == "}":
        yield text[0]
        text = text[1:].strip()
    if found := re.match(r"(\w+):(?!:)\s*", text):
        yield found.group()
        text = text[found.end() :]
    if found := re.match(r"@(!?)(\w+)\s+", text):
        yield f"if ({found[1]}{found[2]})"
        text = text[found.end() :]
    if not text:
        return
    name, _, rest = text.partition(" ")
    if text.startswith(".reg .pred "):
        yield f"bool {text.removeprefix('.reg .pred ')};"
    elif name == "bra":
        yield f"goto {rest.strip()};"
    else:
        arguments = [word for word in re.split(r"[\s,{}\[\]]+", rest) if word not in ("", "_")]
        known = [re.sub(r"%(\d+)", lambda found: operands[int(found[1])], word) for word in arguments]
        yield f"{re.sub(r'[.:]+', '_', name)}({', '.join(known)});"
