"""`--ignore auto`: which layers stay BF16, by what quantizing each of them alone does to the model's answers.

The model is loaded and converted for this, so unlike the rest of the quantizer it must fit in memory. What quantizes it
here is plain amax, which ranks layers as well as a better recipe would and takes a fraction of the time. Each group is
measured in the prompt alone (`phase`, by which layers are chosen) and in the answer alone (`decode-only`). It reads two
examples of the agent ladder that neither evaluation nor calibration uses. Where a model is certain of every token, as
the shipped one is on the lower rungs, KLD is nothing but rounding: these are of tasks and a rung at which it hesitates.
Two of them rank the few layers that stand out, not those that are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mixquant.checkpoint.locate import Found
from mixquant.evaluate.engine import Query
from mixquant.integrations.transformers.generation import check_length
from mixquant.integrations.transformers.loading import load_config, load_model, load_tokenizer
from mixquant.integrations.transformers.sensitivity import GroupError, fused_layers, measure
from mixquant.offline.texts import SEED
from mixquant.policy import Policy
from mixquant.prompts import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def _examples(tokenizer: PreTrainedTokenizerBase) -> tuple[list[Query], list[list[int]]]:
    """The prompts, and their worked answers."""
    from mixquant.tasks import generate

    examples = [generate(task, RUNG, SEED, INDEX) for task in EXAMPLES]
    prompts = [encode(tokenizer, example.prompt)[0].tolist() for example in examples]
    answers = [tokenizer(example.reference, add_special_tokens=False).input_ids for example in examples]
    pairs = zip(examples, prompts, answers, strict=True)
    return [Query(example.prompt, ids, len(answer)) for example, ids, answer in pairs], answers
