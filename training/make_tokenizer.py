"""Train the demo model's tokenizer: byte-level BPE with 512 entries, digits one by one.

    PYTHONPATH=src python training/make_tokenizer.py src/mixquant/demo/model

Deterministic. The folder must hold chat_template.jinja, which becomes the tokenizer's template.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from data import samples
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKUP = ["<tool_call>", "</tool_call>"]  # ordinary tokens: decoding must keep them
# A word or a run of punctuation takes the space before it; a digit stands alone.
PATTERN = r"\d| ?[^\s\d\p{P}\p{S}]+| ?[\p{P}\p{S}]+|\s"


def train(vocabulary: int = 512) -> Tokenizer:
    """A byte-level BPE of exactly `vocabulary` entries, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(MARKUP),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (re.sub(r"<[|/a-z_]+>", "", text) for text in samples(0, 2000))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKUP])
    return tokenizer


def main(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the template into `folder`."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train(),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=3072,
        padding_side="left",
    )
    fast.chat_template = (folder / "chat_template.jinja").read_text()
    fast.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # Transformers 5 writes its new class name, which Transformers 4 cannot read; both know this one.
    config = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
