"""The command line: parses, calls, prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mixquant.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Phase-aware quantization for LLM inference: prompts at FP4 speed, answers at BF16 quality.",
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or demo.")]
FORMATS = "Format of prompt tokens: auto, nvfp4, fp8, int8 or bf16."
Prefill = Annotated[str, typer.Option(help=FORMATS)]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def demo(device: Device = None, json_: Json = False) -> None:
    """The shipped model on a real agent transcript: its answer, then the arms side by side."""
    from mixquant.demo import showcase
    from mixquant.models import parse_device

    where = parse_device(device)
    _quiet()
    result = showcase.run(where, showcase.Printer(silent=json_))
    if json_:
        _print_json(result)


@app.command()
def generate(
    model: ModelName,
    prompt_file: Annotated[Path, typer.Option(help="Text as it stands, or a .json list of chat messages.")],
    prefill: Prefill = "auto",
    native: Annotated[bool, typer.Option("--native", help="Refuse emulated kernels.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Answer one prompt: prompt tokens in the prefill format, the answer in BF16."""
    from mixquant import generation, models
    from mixquant.policy import Policy

    policy = Policy(prefill=prefill, native=native)
    prompt = generation.read_prompt(prompt_file)
    where = models.parse_device(device)
    models.locate(model)
    _quiet()
    tokenizer = models.load_tokenizer(model)
    ids = generation.encode(tokenizer, prompt)
    generation.check_length(models.load_config(model), ids.shape[1], max_new_tokens)
    loaded = models.load_model(model, policy, where)
    echo = (lambda piece: None) if json_ else (lambda piece: print(piece, end="", flush=True))
    answer = generation.generate(loaded, tokenizer, ids, max_new_tokens, echo)
    if json_:
        _print_json(answer.to_dict())
    else:
        print()
        typer.echo(_summary(answer.to_dict()), err=True)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Also print this model's bill.")] = None,
    prefill: Prefill = "auto",
    device: Device = None,
    json_: Json = False,
) -> None:
    """Device, the kernel each format gets and why, versions, and a model's memory bill before anything loads."""
    from mixquant import doctor as doctor_
    from mixquant.models import parse_device

    where = parse_device(device)
    _quiet()
    report = doctor_.examine(where, model, prefill)
    if json_:
        _print_json(report)
    else:
        doctor_.show(report)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: ModelName,
    prefill: Annotated[str | None, typer.Option(help=FORMATS)] = None,
    tail: Annotated[int | None, typer.Option(help="Precise tokens at the end of a prompt, by default 1.")] = None,
    native: Annotated[bool, typer.Option("--native", help="Refuse emulated kernels.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on, by default all.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, by default 8000.")] = None,
) -> None:
    """An OpenAI-compatible server: vLLM's own, which takes all of its options after --."""
    from mixquant import serve as serve_

    policy = {"prefill": prefill, "tail": tail, "native": native or None}
    address = {"--host": host, "--port": port}
    options = [str(part) for name, value in address.items() if value is not None for part in (name, value)]
    serve_.run(model, {key: value for key, value in policy.items() if value is not None}, [*options, *context.args])


def main() -> None:
    """Entry point: bad input is one sentence on stderr and exit code 2."""
    try:
        app()
    except InputError as error:
        print(f"mixquant: {error}", file=sys.stderr)
        sys.exit(2)


def _summary(answer: dict[str, Any]) -> str:
    times = (
        "emulated, so no times"
        if answer["emulated"]
        else f"prefill {answer['prefill_ms']} ms, decode {answer['decode_ms_per_token']} ms a token"
    )
    used = ", ".join(f"{phase} {'+'.join(names)}" for phase, names in answer["kernels"].items())
    return f"[{answer['prompt_tokens']} prompt tokens; {times}; {used}; {answer['device']}]"


def _print_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _quiet() -> None:
    """Keep Transformers' chatter off; its progress bar shows on a terminal only."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
