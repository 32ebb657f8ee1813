"""`--ignore-worst SHARE`: which layers stay BF16, by what quantizing each of them alone does to the model's answers.

What: a step before the run. It measures every group of layers that engines fuse, and chooses those that hurt most.

How: the model is loaded and converted, so unlike the rest of the quantizer this needs memory for all of it. The scales
are plain amax, which ranks layers as well as a better recipe and takes a fraction of the time. Each group is measured
in the prompt alone (`phase`, by which layers are chosen) and in the answer alone (`decode-only`). It reads two examples
of the agent ladder that neither evaluation nor calibration uses.

Trade-off: two examples rank the few layers that stand out, not those that are alike. Where a model is certain of every
token, as the shipped one is on the lower rungs, KLD is nothing but rounding: hence tasks and a rung at which it
hesitates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from mixquant.checkpoint.locate import Found
from mixquant.evaluate.engine import Query
from mixquant.integrations.transformers.generation import check_length
from mixquant.integrations.transformers.loading import load_config, load_model, load_tokenizer
from mixquant.integrations.transformers.sensitivity import GroupError, fused_layers, measure
from mixquant.offline.calibration_text import SEED
from mixquant.policy import Policy
from mixquant.prompts import Tokenizer, encode

ARMS = ("phase", "decode-only")
EXAMPLES = ("arithmetic", "toolcall")
RUNG = 3
INDEX = 1_000_000
"""The first example that calibration does not reach."""


def measure_layers(
    found: Found,
    policy: Policy,
    device: torch.device,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = lambda batches: batches,
) -> dict[str, list[GroupError]]:
    """What each group of layers does alone, arm by arm. Raises InputError for a model without a chat template."""
    config, tokenizer = load_config(found), load_tokenizer(found)
    queries, answers = _examples(tokenizer)
    for query, answer in zip(queries, answers, strict=True):
        check_length(config, len(query.ids), len(answer))
    model = load_model(found, replace(policy, scales="amax"), device)
    groups = fused_layers(model)
    return {arm: measure(model, groups, queries, answers, arm, batch=1, progress=progress) for arm in ARMS}


def _examples(tokenizer: Tokenizer) -> tuple[list[Query], list[list[int]]]:
    """The prompts, and their worked answers."""
    from mixquant.tasks import generate

    examples = [generate(task, RUNG, SEED, INDEX) for task in EXAMPLES]
    prompts = [encode(tokenizer, example.prompt)[0].tolist() for example in examples]
    answers = [tokenizer(example.reference, add_special_tokens=False).input_ids for example in examples]
    pairs = zip(examples, prompts, answers, strict=True)
    return [Query(example.prompt, ids, len(answer)) for example, ids, answer in pairs], answers
