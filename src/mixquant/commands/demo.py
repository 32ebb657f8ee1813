"""`mixquant demo`: an answer to a real agent transcript, then the arms side by side.

Arms of the device's native format show times, measured in turns within one process (medians); NVFP4 is emulated
outside of Blackwell and shows none. Quality is measured on a small batch of examples that training never saw: answers
right, and the KL divergence to BF16 at the reference answer's positions.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mixquant import kernels, tasks
from mixquant.checkpoint.locate import DEMO, find
from mixquant.devices import size_text
from mixquant.errors import InputError
from mixquant.evaluate.engine import Query
from mixquant.evaluate.items import MARGIN
from mixquant.evaluate.metrics import Estimate, estimate, kl_divergence
from mixquant.integrations.transformers import generation
from mixquant.integrations.transformers.engine import TransformersBackend
from mixquant.integrations.transformers.generation import Generation
from mixquant.integrations.transformers.loading import load_model, load_tokenizer
from mixquant.model.explain import activation_ranges, is_emulated, kernels_used
from mixquant.model.memory import memory
from mixquant.policy import Policy, arm
from mixquant.prompts import Chat, Tokenizer, encode, read_prompt, token_ids

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TRANSCRIPTS = DEMO.parent / "transcripts"
SEED = 1
RUNG = 1  # of each task: what BF16 solves, in prompts short enough for a laptop
EXAMPLES_PER_TASK = 4
ROUNDS = 5
NEW_TOKENS = 160


@dataclass
class Arm:
    """One policy's model and what was measured of it."""

    name: str
    model: Any
    correct: int = 0
    kld: Estimate | None = None
    prefill_ms: float | None = None
    decode_ms_per_token: float | None = None

    @property
    def emulated(self) -> bool:
        return is_emulated(self.model)

    def to_dict(self) -> dict[str, Any]:
        return {
            "emulated": self.emulated,
            "kernels": kernels_used(self.model),
            "correct": self.correct,
            "kld_mean": self.kld.mean if self.kld else None,
            "kld_se": self.kld.se if self.kld else None,
            "prefill_ms": self.prefill_ms,
            "decode_ms_per_token": self.decode_ms_per_token,
            "memory": memory(self.model).to_dict(),
        }


def run(device: torch.device, out: Console) -> dict[str, Any]:
    """Run the whole show; returns what it printed as a document."""
    found = find("demo")
    tokenizer = load_tokenizer(found)
    arms = {name: Arm(name, load_model(found, policy, device)) for name, policy in _policies(device).items()}
    answer, ids = _answer(arms, tokenizer, out)
    examples = _examples()
    out.print(f"Measuring {len(arms)} arms on {len(examples)} examples of an easy rung ...")
    _measure_quality(arms, tokenizer, examples)
    _measure_times(arms, tokenizer, ids)
    out.print(_table(arms, len(examples)))
    out.print("Kernels. " + "; ".join(map(_kernels, arms.values())) + ".")
    out.print("The model is too small for prefill speed to show: benchmarks/cpu.py compares at 400M parameters.")
    if any(arm.emulated for arm in arms.values()):
        out.print("Emulated arms compute the format's own numbers; their speed would mean nothing.")
    ranges = _activation_range(arms["phase nvfp4"].model, ids)
    out.print(
        f"NVFP4's activation scale, static and uncalibrated, covers block maxima from {ranges['lowest']:.2g} to "
        f"{ranges['highest']:.4g}: of {ranges['blocks']:,} blocks that this prompt sends into linear layers "
        f"{ranges['overflow']:,} lie above and are clipped, {ranges['underflow']:,} below."
    )
    document = {name: arm.to_dict() for name, arm in arms.items()}
    return {
        "device": answer["device"],
        "answer": answer,
        "examples": len(examples),
        "arms": document,
        "activation_range": ranges,
    }


def _policies(device: torch.device) -> dict[str, Policy]:
    try:
        native = kernels.resolve_format("auto", device, torch.bfloat16)
    except InputError:
        native = "int8"
    formats = dict.fromkeys((native, "nvfp4"))
    arms = {f"{name} {format}": arm(name, format) for format in formats for name in ("uniform", "phase")}
    return {"bf16": arm("bf16", "bf16"), **arms}


def _answer(arms: dict[str, Arm], tokenizer: Tokenizer, out: Console) -> tuple[dict[str, Any], Tensor]:
    """Stream one answer through the native phase arm."""
    transcript = min(TRANSCRIPTS.glob("*.json"))
    prompt = read_prompt(transcript)
    assert isinstance(prompt, Chat)
    ids = encode(tokenizer, prompt)
    chosen = next(arm for arm in arms.values() if arm.name.startswith("phase"))
    out.print(
        f"[bold]{transcript.name}[/bold]: {ids.shape[1]} prompt tokens, answered by the arm [bold]{chosen.name}[/bold]"
    )
    out.print(f"[dim]{prompt.messages[-1]['content']}[/dim]\n")
    answer = generation.generate(
        chosen.model, tokenizer, ids, NEW_TOKENS, lambda piece: out.print(piece, end="", markup=False, soft_wrap=True)
    )
    out.print("\n")
    return answer.to_dict(), ids


def _examples() -> list[tasks.Question]:
    return [tasks.generate(task, RUNG, SEED, index) for task in tasks.LADDER for index in range(EXAMPLES_PER_TASK)]


def _measure_quality(arms: dict[str, Arm], tokenizer: Tokenizer, examples: list[tasks.Question]) -> None:
    prompts = [token_ids(tokenizer, example.prompt) for example in examples]
    answers = [tokenizer(example.reference, add_special_tokens=False).input_ids for example in examples]
    queries = [
        Query(example.prompt, prompt, len(answer) + MARGIN)
        for example, prompt, answer in zip(examples, prompts, answers, strict=True)
    ]
    reference: list[Tensor] = []
    for arm_ in arms.values():
        engine = TransformersBackend(arm_.model).open("phase")  # what the model was converted to
        texts = tokenizer.batch_decode(engine.generate(queries, answers), skip_special_tokens=True)
        arm_.correct = sum(example.is_right(text) for example, text in zip(examples, texts, strict=True))
        logits = engine.score(queries, answers)
        reference = reference or logits
        arm_.kld = estimate([float(kl_divergence(r, q).mean()) for r, q in zip(reference, logits, strict=True)])


def _measure_times(arms: dict[str, Arm], tokenizer: Tokenizer, ids: Tensor) -> None:
    """Medians over rounds in which the native arms take turns."""
    native = [arm for arm in arms.values() if not arm.emulated]
    samples: dict[str, list[Generation]] = {arm.name: [] for arm in native}
    for _ in range(ROUNDS):
        for arm_ in native:
            samples[arm_.name].append(generation.generate(arm_.model, tokenizer, ids, 32))
    for arm_ in native:
        runs = samples[arm_.name]
        arm_.prefill_ms = statistics.median(run.prefill_ms for run in runs if run.prefill_ms is not None)
        arm_.decode_ms_per_token = statistics.median(
            run.decode_ms_per_token for run in runs if run.decode_ms_per_token is not None
        )


def _activation_range(model: Any, ids: Tensor) -> dict[str, float]:
    """What NVFP4's static activation scale covers, and what it misses over all layers."""
    layers = list(activation_ranges(model, ids.to(model.device)).values())
    counts = {key: sum(getattr(layer, key) for layer in layers) for key in ("blocks", "underflow", "overflow")}
    return {"lowest": layers[0].lowest, "highest": layers[0].highest, **counts}


def _table(arms: dict[str, Arm], examples: int) -> Table:
    from rich.table import Table

    table = Table("arm", "prefill", "decode/token", "right", "KLD to BF16", "memory")
    for arm_ in arms.values():
        table.add_row(
            arm_.name,
            f"{arm_.prefill_ms:.1f} ms" if arm_.prefill_ms else "-",
            f"{arm_.decode_ms_per_token:.2f} ms" if arm_.decode_ms_per_token else "-",
            f"{arm_.correct}/{examples}",
            str(arm_.kld) if arm_.name != "bf16" else "0",
            size_text(memory(arm_.model).total_bytes),
        )
    return table


def _kernels(arm_: Arm) -> str:
    used = kernels_used(arm_.model)
    return f"{arm_.name}: prefill {'+'.join(used['prefill'])}, decode {'+'.join(used['decode'])}"
