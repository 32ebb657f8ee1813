"""Norms and MLPs that leave their output to the linear layers that read it (see `deferred`), for NVFP4 on tensor cores.

Which modules: those whose own forward, asked on a small input, gives the bits of Transformers' RMSNorm or SwiGLU, and
whose readers can be such layers. What a module is called says nothing. All others stay as they are, and so does every
model whose prompts run by another kernel.
When: in forwards with prompt rows, outside of autograd and of torch.compile, which would have to see through them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mixquant.kernels.cuda import NVFP4ScaledMM
from mixquant.model.deferred import Deferred, Gated, Normed
from mixquant.model.linear import PhaseLinear, PhaseState
from mixquant.model.targets import decoder
from mixquant.phase import Phase

WIDTH = 16
"""Columns of the input on which a module is asked what it computes."""


def install(model: nn.Module, state: PhaseState) -> None:
    """Put forwards that defer over the norms and MLPs of a converted model whose layers can take what they make.

    Not over the last norm, which stands in the decoder itself: what it returns is handed out.
    """
    layers = [m for m in model.modules() if isinstance(m, PhaseLinear) and isinstance(m.prefill, NVFP4ScaledMM)]
    widths = {layer.in_features for layer in layers}
    whole = decoder(model)
    for module in set(whole.modules()) - set(whole.children()) if layers else ():
        if (epsilon := rms_norm(module)) is not None and module.weight.numel() in widths:  # type: ignore[operator]
            defer = functools.partial(_norm, state, module, epsilon, module.forward)
        elif getattr(module, "down_proj", None) in layers and is_swiglu(module):
            defer = functools.partial(_swiglu, state, module, module.forward)
        else:
            continue
        module.forward = functools.wraps(module.forward)(defer)


def _defers(state: PhaseState, *operands: Tensor) -> bool:
    return (
        state.plan is not None
        and bool(state.plan.runs)
        and state.plan.only is not Phase.DECODE
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(operand.dtype is torch.bfloat16 for operand in operands)
    )


def _norm(
    state: PhaseState, module: nn.Module, epsilon: float, original: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    if not _defers(state, x, module.weight):  # type: ignore[arg-type]
        return original(x)
    rows = x.reshape(-1, x.shape[-1])
    return Deferred(Normed((rows,), module.weight, epsilon, original), x)  # type: ignore[arg-type]


def _swiglu(state: PhaseState, mlp: Any, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if not _defers(state, x):
        return original(x)
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    down: Tensor = mlp.down_proj(Deferred(Gated((gate.flatten(0, -2), up.flatten(0, -2))), gate))
    return down


def rms_norm(module: nn.Module) -> float | None:
    """The epsilon of a module that computes Transformers' RMSNorm, None for every other."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(epsilon, float) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    x, weight = (torch.linspace(*ends, WIDTH).bfloat16() for ends in ((-2.0, 3.0), (0.5, 1.7)))
    factor = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    given = SimpleNamespace(weight=weight, variance_epsilon=epsilon, eps=epsilon)
    return epsilon if _answers(module, given, x, weight * (x.float() * factor).bfloat16()) else None


def is_swiglu(module: nn.Module) -> bool:
    """Whether a module computes down_proj(silu(gate_proj(x)) * up_proj(x))."""
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        "gate_proj": lambda x: x * 3, "up_proj": lambda x: x + 1, "down_proj": lambda x: x - 2,
    }  # fmt: skip
    x = torch.linspace(-2.0, 3.0, WIDTH).bfloat16()
    given = SimpleNamespace(**parts, act_fn=getattr(module, "act_fn", None))
    return _answers(module, given, x, nn.functional.silu(x * 3) * (x + 1) - 2)


def _answers(module: nn.Module, given: SimpleNamespace, x: Tensor, expected: Tensor) -> bool:
    """Whether the forward of a module's class, on these parts of it, gives the expected bits."""
    try:
        with torch.no_grad():
            found = type(module).forward(given, x[None])
    except Exception:  # it needs what such a module does not have, so it computes something else
        return False
    return isinstance(found, Tensor) and found.dtype is expected.dtype and torch.equal(found[0], expected)
