"""The command line: parses, calls, prints. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mixquant import __version__
from mixquant.commands.stdout import whole_output
from mixquant.errors import InputError
from mixquant.packages import require
from mixquant.policy import ARMS, TAIL

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Phase-aware quantization for LLM inference: prompts in NVFP4, FP8 or INT8, answers in BF16.",
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a hub id, or demo.")]
PASSES_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of commands that take another program's options."""
FORMATS = "Format of prompt tokens: auto, nvfp4, fp8, int8 or bf16."
Prefill = Annotated[str, typer.Option(help=FORMATS)]
Storage = Annotated[str, typer.Option(help="One weight for both phases: auto, nested or separate.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Native = Annotated[bool, typer.Option("--native", help="Refuse emulated kernels.")]
Tail = Annotated[int, typer.Option(help="Precise tokens at the end of a prompt.")]
ResultsFile = Annotated[Path, typer.Option("--output", "-o", help="Results file; a run that was stopped resumes.")]
FurtherArms = Annotated[
    list[str] | None, typer.Option(help="NAME=POLICY: any policy as a further arm, such as tail64=nvfp4,tail=64.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mixquant {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
def demo(device: Device = None, json_: Json = False) -> None:
    """The shipped model on a real agent transcript: its answer, then the arms side by side."""
    from rich.console import Console

    from mixquant.commands import demo as showcase
    from mixquant.devices import parse_device

    where = parse_device(device)
    _quiet()
    result = showcase.run(where, Console(quiet=json_, highlight=False))
    if json_:
        _print_json(result)


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str | None, typer.Option(help="The prompt, as it stands.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="Text as it stands, or a .json list of chat messages; - is stdin.")
    ] = None,
    prefill: Prefill = "auto",
    tail: Tail = TAIL,
    native: Native = False,
    storage: Storage = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Answer one prompt: prompt tokens in the prefill format, the answer in BF16."""
    from mixquant.commands import generate as generate_
    from mixquant.devices import parse_device
    from mixquant.policy import Policy

    policy = Policy(prefill=prefill, tail=tail, native=native, storage=storage)
    asked, where = generate_.asked(prompt, prompt_file), parse_device(device)
    _quiet()
    echo = (lambda piece: None) if json_ else (lambda piece: print(piece, end="", flush=True))
    _show(generate_.run(model, asked, policy, where, max_new_tokens, echo), json_, generate_.show)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Also print this model's bill.")] = None,
    prefill: Prefill = "auto",
    storage: Storage = "auto",
    device: Device = None,
    json_: Json = False,
) -> None:
    """Device, the kernel each format gets and why, versions, and a model's memory bill before anything loads."""
    from mixquant.commands import doctor as doctor_
    from mixquant.devices import parse_device

    where = parse_device(device)
    _quiet()
    _show(doctor_.examine(where, model, prefill, storage), json_, doctor_.show)


@app.command()
def quantize(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")],
    prefill: Annotated[str, typer.Option(help="nvfp4, fp8 or int8.")] = "nvfp4",
    scales: Annotated[str, typer.Option(help="Block scales of NVFP4: search or amax.")] = "search",
    fold: Annotated[bool, typer.Option("--fold", help="Fold channels; writes the BF16 side too.")] = False,
    gptq: Annotated[
        bool | None, typer.Option(help="Choose NVFP4 codes by GPTQ; by default with calibration, unless --scales amax.")
    ] = None,
    calibration: Annotated[str, typer.Option(help="agents, none, or a text or JSONL file.")] = "agents",
    ignore: Annotated[list[str], typer.Option(help="Layers that stay BF16: name patterns.")] = [],  # noqa: B006
    ignore_worst: Annotated[
        float | None, typer.Option(help="Share of the weights that stay BF16: of the layers that hurt most.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR once the new one is complete.")] = False,
    device: Device = None,
) -> None:
    """Write quantized prefill weights that every engine loads; a run that was killed goes on where it stopped."""
    from mixquant.commands.heartbeat import heartbeat
    from mixquant.offline import display, pipeline

    _quiet()
    with heartbeat("quantize") as stage:
        result = pipeline.quantize(
            model, {"prefill": prefill, "scales": scales, "ignore": ignore}, output=output,
            calibration=None if calibration == "none" else calibration,
            fold=fold, gptq=gptq, ignore_worst=ignore_worst, overwrite=overwrite, device=device,
            progress=lambda steps: display.shown(steps, stage),
        )  # fmt: skip
    display.show(result)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="A quantized folder: ours, or another tool's.")],
    json_: Json = False,
) -> None:
    """What a quantized folder holds: formats, layers, recipe and BF16 model. Reads headers only."""
    from mixquant.commands import inspect as inspection

    _show(inspection.inspect(folder), json_, inspection.show)


@app.command("eval")
def evaluate(
    model: ModelName,
    output: ResultsFile,
    tasks: Annotated[str, typer.Option(help="Suites, tasks, files and lm-eval:TASK, with commas between.")] = "agent",
    arms: Annotated[
        str, typer.Option(help="Arms, with commas between; ARM-control repeats one in other batches.")
    ] = ",".join(ARMS),
    arm: FurtherArms = None,
    prefill: Annotated[str, typer.Option(help="Quantized format of the arms: nvfp4, fp8 or int8.")] = "nvfp4",
    tail: Tail = TAIL,
    engine: Annotated[str, typer.Option(help="transformers or vllm.")] = "transformers",
    server: Annotated[list[str] | None, typer.Option(help="ARM=URL of an OpenAI-compatible server.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The model's name on servers, if not MODEL's.")] = None,
    seeds: Annotated[str, typer.Option(help="How many data seeds, from 100 on, or which: 11,12,13.")] = "3",
    limit: Annotated[int, typer.Option(min=1, help="Examples for each rung and data seed.")] = 334,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Leave out rungs with longer prompts.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also measure the error of each decoder layer.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples that run together.")] = None,
    device: Device = None,
) -> None:
    """What quantizing the prompt costs, what quantizing everything would cost, and whether the difference is real."""
    from mixquant.commands import evaluate as evaluation
    from mixquant.integrations.openai import parse_servers

    settings = evaluation.Settings(
        model=model, arms=_names(arms), questions=arm or [], tasks=_names(tasks), prefill=prefill, tail=tail,
        engine=engine, servers=parse_servers(server or []), served_model_name=served_model_name,
        seeds=evaluation.parse_seeds(seeds), limit=limit, max_prompt_tokens=max_prompt_tokens, layers=layers,
        batch_size=batch_size, device=device,
    )  # fmt: skip
    _quiet()
    results = evaluation.evaluate(settings, output, shlex.join(["mixquant", *sys.argv[1:]]))
    print(results.verdict.sentence)
    for note in results.notes:
        typer.echo(f"Note: {note}", err=True)
    _say_next(output)


@app.command()
def bench(
    model: ModelName,
    output: ResultsFile,
    engine: Annotated[str, typer.Option(help="vllm or transformers.")] = "vllm",
    arms: Annotated[
        str | None,
        typer.Option(
            help="Arms, with commas between; vllm:fp8 is vLLM's own quantization.",
            show_default="bf16,vllm:fp8,uniform,phase; of transformers: bf16,uniform,phase",
        ),
    ] = None,
    arm: FurtherArms = None,
    workload: Annotated[
        str | None,
        typer.Option(
            help="prompts, agent, decode, serve, or JSON files; with commas between.",
            show_default="prompts,agent,decode; of transformers: prompts,decode",
        ),
    ] = None,
    prefill: Annotated[str, typer.Option(help="Quantized format of the arms: auto, nvfp4, fp8 or int8.")] = "auto",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns of each arm, instead of each workload's own.")
    ] = None,
    load_format: Annotated[str, typer.Option(help="vLLM's own; dummy makes weights up.")] = "auto",
    server: Annotated[
        list[str] | None, typer.Option(help="ARM=URL of a vLLM server that runs already, for --workload serve.")
    ] = None,
) -> None:
    """How fast: arms of one engine take turns request by request, and each figure stands beside its ceiling."""
    from mixquant.commands import bench as benchmark

    settings = benchmark.Settings(
        model=model, engine=engine, arms=_names(arms or ""), questions=arm or [], workloads=_names(workload or ""),
        prefill=prefill, rounds=rounds, load_format=load_format, servers=server or [],
    )  # fmt: skip
    _quiet()
    results = benchmark.bench(settings, output, shlex.join(["mixquant", *sys.argv[1:]]))
    benchmark.show(results)
    _say_next(output)


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS.json...", help="What mixquant eval or bench wrote.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .html, .md or .png file.")],
) -> None:
    """Results as a page for people: the verdict first, then every figure behind it."""
    from mixquant import report as report_

    report_.write(results, output)


@app.command(context_settings=PASSES_ON)
def serve(
    context: typer.Context,
    model: ModelName,
    prefill: Annotated[str | None, typer.Option(help=FORMATS)] = None,
    tail: Annotated[int | None, typer.Option(help="Precise tokens at a prompt's end: 32; pairs and experts 1.")] = None,
    min_prompt: Annotated[int | None, typer.Option(help="Prompts with fewer new tokens are precise.")] = None,
    native: Native = False,
    storage: Annotated[str | None, typer.Option(help="auto, nested or separate.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on, by default all.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen on, by default 8000.")] = None,
    prefill_servers: Annotated[int, typer.Option(min=0, help="Servers that read prompts.")] = 0,
    decode_servers: Annotated[int, typer.Option(min=0, help="Servers that write answers.")] = 0,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of a pair's metrics, by default the one after --port.")
    ] = None,
    role: Annotated[str | None, typer.Option(help="Be one part of a pair: prefill, decode or router.")] = None,
    prefill_url: Annotated[list[str], typer.Option(help="A prefill server, for --role router.")] = [],  # noqa: B006
    decode_url: Annotated[list[str], typer.Option(help="A decode server, for --role router.")] = [],  # noqa: B006
) -> None:
    """An OpenAI-compatible server: vLLM's own, which takes all of its options after --.

    With --prefill-servers and --decode-servers, several of them behind vLLM's router: prompts are read on one GPU
    and answers written on another.

    Worth knowing: --shutdown-timeout 30 lets running answers end on SIGTERM (otherwise their clients hang), and
    --enable-auto-tool-choice --tool-call-parser hermes turn a model's tool calls into the API's.
    """
    policy = {
        "prefill": prefill, "tail": tail, "min_prompt": min_prompt, "native": native or None, "storage": storage,
    }  # fmt: skip
    given = {key: value for key, value in policy.items() if value is not None}
    if prefill_servers or decode_servers or prefill_url or decode_url or role == "router":
        from mixquant.commands import pair

        pair.start(
            pair.Asked(
                model=model, policy=given, options=context.args, host=host or "0.0.0.0", port=port or 8000,
                metrics_port=metrics_port or (port or 8000) % 65535 + 1, role=role, prefill_servers=prefill_servers,
                decode_servers=decode_servers, prefill_urls=prefill_url, decode_urls=decode_url,
            )
        )  # fmt: skip
        return
    from mixquant.integrations.vllm import server as serve_

    address = {"--host": host, "--port": port}
    options = [str(part) for name, value in address.items() if value is not None for part in (name, value)]
    serve_.run(model, given, [*options, *context.args], role)


@app.command()
def plan(
    model: ModelName,
    bench: Annotated[list[Path], typer.Option(help="Files of mixquant bench, on the GPU that is planned for.")],
    rate: Annotated[float, typer.Option(help="Requests a second.")],
    isl: Annotated[str, typer.Option(help="Tokens of a request's whole prompt on average, such as 8k.")],
    osl: Annotated[str, typer.Option(help="Tokens of an answer on average.")],
    turns: Annotated[int, typer.Option(help="Turns of a conversation, each of which sends all before it again.")] = 1,
    cache_hits: Annotated[
        float | None, typer.Option(help="Share of prompts in the prefix cache; by default, by the turns.")
    ] = None,
    arms: Annotated[
        str, typer.Option(help="The bench's arms for a prefill server, a decode server, and an engine that does both.")
    ] = "uniform,bf16,phase",
    json_: Json = False,
) -> None:
    """Servers per role for a given traffic, by the figures of mixquant bench."""
    from mixquant.commands import plan as planning

    _quiet()
    asked = planning.Traffic(
        isl=planning.tokens(isl), osl=planning.tokens(osl), turns=turns, rate=rate, cache_hits=cache_hits
    )
    _show(planning.plan(model, bench, asked, _names(arms)), json_, planning.show)


@app.command("lm-eval", context_settings=PASSES_ON | {"help_option_names": []})
def lm_eval(context: typer.Context) -> None:
    """lm-eval's own command line and options, with our models as --model mixquant."""
    require("lm_eval")
    from mixquant.integrations import lm_eval as lm_eval_

    lm_eval_.run(context.args)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: bad input, and an output that cannot be written, are one sentence on stderr and exit code 2."""
    try:
        with whole_output():
            app(arguments, prog_name="mixquant")
    except InputError as error:
        print(f"mixquant: {error}", file=sys.stderr)
        sys.exit(2)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _show(found: Any, json_: bool, show: Callable[[Any], None]) -> None:
    """What a command has found, as JSON or as `show` prints it for people."""
    if json_:
        _print_json(found if isinstance(found, dict) else asdict(found))
    else:
        show(found)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=2, ensure_ascii=False))


def _say_next(results: Path) -> None:
    typer.echo(f"Next: mixquant report {results} -o {results.with_suffix('.html')}", err=True)


def _quiet() -> None:
    """Keep Transformers' chatter off; its progress bar shows on a terminal only."""
    from mixquant.integrations.transformers import quiet

    quiet(progress_bars=sys.stderr.isatty())
