"""convert_: replace a causal language model's linear layers by phase-aware ones, in place.

Which layers: every nn.Linear of the decoder, except the output head, MoE routers, vision and audio towers, MLA's
`kv_b_proj`, draft heads, and what `ignore` names. Layers that share a module or a weight share their kernels. Experts
that Transformers fuses into one tensor are no nn.Linear: they stay as they are, with a warning. So do layers that keep
separate copies where others nest.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from mixquant.checkpoint.mapped import release
from mixquant.checkpoint.sidecar import Sidecar, write_sidecar
from mixquant.errors import InputError
from mixquant.formats import quantizer
from mixquant.kernels import choose
from mixquant.kernels.base import LinearKernel, PlainKernel, QuantizedKernel
from mixquant.kernels.layer import Built, build, choose_kernels
from mixquant.model import producers
from mixquant.model.linear import PhaseLinear, PhaseState
from mixquant.model.targets import decoder, experts_share, target_linears, unwrap
from mixquant.model.tracking import PromptTracker, wrap_method
from mixquant.policy import Policy

if TYPE_CHECKING:
    from mixquant.checkpoint.prefill import PrefillWeights


class Converter:
    """Turns one nn.Linear after another into PhaseLinear; `convert_` and the Transformers loader share it.

    weights: where quantized weights come from; None means that they are made of the model's own.
    """

    def __init__(self, policy: Policy, weights: PrefillWeights | None = None) -> None:
        if policy.role != "both":
            raise InputError(f"role={policy.role} is for one server of a pair (docs/pair.md): leave it out.")
        if policy.min_prompt:
            raise InputError(f"min_prompt={policy.min_prompt} is for vLLM's requests: leave it out in Transformers.")
        self.policy = policy
        self.weights = weights
        self.state = PhaseState()
        self.separate: dict[str, str] = {}  # layer -> why its weight is not nested, where others are
        self._built = WeakIdKeyDictionary()  # weight -> Built: tied weights share their kernels

    def convert(self, linear: nn.Linear, name: str, weight: Tensor | None = None) -> PhaseLinear:
        """The phase-aware layer that stands in for `linear`, whose weight may be given if it is not loaded yet."""
        weight = linear.weight if weight is None else weight
        if weight not in self._built:
            self._built[weight] = self._build(weight, name)
        built: Built[LinearKernel] = self._built[weight]
        if built.separate is not None:
            self.separate[name] = built.separate
        if not (built.prefill.keeps_weight or built.decode.keeps_weight):
            release(weight)  # what it held is in the kernels' layouts now
        return PhaseLinear(
            name, linear.in_features, linear.out_features, prefill=built.prefill, decode=built.decode,
            bias=linear.bias, dtype=weight.dtype, device=weight.device, state=self.state,
        )  # fmt: skip

    def _build(self, weight: Tensor, name: str) -> Built[LinearKernel]:
        try:
            make = functools.partial(self._copy, weight, name)
            return build(self.policy, weight, make, from_folder=self.weights is not None)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def kernel(self, format: str, weight: Tensor, name: str) -> LinearKernel:
        """A layer's kernel in a format, from its BF16 weight [N, K]: a copy that no other phase shares."""
        try:
            return self._copy(weight, name, choose(format, weight.shape, weight.device, weight.dtype, self.policy))
        except InputError as error:
            raise InputError(f"{name}: {error}") from None

    def _copy(self, weight: Tensor, name: str, kernel: type[LinearKernel]) -> LinearKernel:
        if issubclass(kernel, PlainKernel):
            return kernel(weight)
        assert issubclass(kernel, QuantizedKernel)
        if self.weights is None:
            return kernel.from_weight(weight, quantizer(kernel.format, self.policy.scales))
        stored = self.weights.read(name, weight)
        return kernel.from_quantized(stored.weight, weight.dtype, stored.activation_global_scale)

    def warn_of_separate(self) -> None:
        """Say which layers are not nested, where others are."""
        if self.separate:
            name, reason = next(iter(self.separate.items()))
            warnings.warn(
                f"{len(self.separate)} layers keep separate weights for prefill and decode, first {name}: {reason}.",
                stacklevel=4,
            )


def convert_(
    model: nn.Module,
    policy: Policy | str | Mapping[str, Any],
    progress: Callable[[list[str]], Iterable[str]] = lambda names: names,
) -> nn.Module:
    """Convert `model` (any torch causal LM whose forward takes input_ids) in place and return it.

    policy: a Policy, a preset's name such as "nvfp4", or a mapping of policy fields. progress: wraps the list of
    layer names, for a progress bar. Raises InputError, before any layer is changed, where the model or the policy is
    unsupported; a NaN or Inf weight raises it with the layer's name.

    >>> import mixquant
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained(mixquant.DEMO, dtype="bfloat16")
    >>> model = mixquant.convert_(model, "fp8")
    >>> first = mixquant.explain(model)[0]
    >>> first["name"], first["prefill"]["format"], first["decode"]["format"]
    ('model.layers.0.self_attn.q_proj', 'fp8', 'bf16')
    """
    policy = Policy.parse(policy)
    wrapper, model = model, unwrap(model)
    layers = dict(target_linears(model, policy))
    check_layers(model, layers, policy)
    converter = Converter(policy)
    made: dict[int, PhaseLinear] = {}  # by module, as one may stand in the model under several names
    for name in progress(list(layers)):
        linear = layers.pop(name)
        if id(linear) not in made:
            made[id(linear)] = converter.convert(linear, name)
        replace_module(model, name, made[id(linear)])
    install(model, converter)
    return wrapper


def install(model: nn.Module, converter: Converter) -> None:
    """Attach the tracker and the policy to a model whose layers are converted."""
    converter.warn_of_separate()
    tracker = PromptTracker(model, decoder(model), converter.state, converter.policy.tail)
    producers.install(model, converter.state)
    model.mixquant_tracker = tracker  # type: ignore[assignment]
    model.mixquant_policy = converter.policy  # type: ignore[assignment]
    wrap_method(model, "_apply", _apply_if_allowed)
    if hasattr(model, "save_pretrained"):
        wrap_method(model, "save_pretrained", functools.partial(_save, model, converter.weights))


def _save(
    model: nn.Module,
    weights: PrefillWeights | None,
    original: Callable[..., Any],
    save_directory: str | Path,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`save_pretrained`: the original model, and the policy beside it."""
    if weights is not None:
        raise InputError(
            f"This model's prefill weights are in {weights.folder.path}, and would be left behind: copy that folder "
            "and the BF16 model instead."
        )
    for layer in model.modules():
        if isinstance(layer, PhaseLinear):
            _ = layer.weight  # raises before anything is written if the original weights are gone
            break
    result = original(save_directory, *args, **kwargs)
    write_sidecar(save_directory, Sidecar(model.mixquant_policy))  # type: ignore[arg-type]
    return result


def _apply_if_allowed(original: Callable[..., nn.Module], fn: Callable[[Tensor], Tensor], *rest: bool) -> nn.Module:
    """Ask every phase-aware layer whether it may be moved or cast, before anything is."""
    for module in original.__self__.modules():  # type: ignore[attr-defined]
        if isinstance(module, PhaseLinear):
            module._apply(fn)
    return original(fn, *rest)


def check_layers(
    model: nn.Module, layers: Mapping[str, nn.Linear], policy: Policy, device: torch.device | None = None
) -> None:
    """Raise InputError where no layer is left or a kernel cannot take a layer's shape; warn of experts left alone."""
    if not layers:
        raise InputError("The model has no linear layer to convert: see `ignore`, or choose a causal language model.")
    for name, layer in layers.items():
        weight = layer.weight
        chosen = choose_kernels(policy, weight.shape, device or weight.device, weight.dtype)
        chosen.check(policy, name, weight.shape)
    if share := experts_share(model):
        warnings.warn(
            f"{share:.0%} of the parameters are fused experts, which mixquant leaves unquantized in Transformers.",
            stacklevel=3,
        )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name` in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
