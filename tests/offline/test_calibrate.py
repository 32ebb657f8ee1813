"""Calibration: text becomes tokens, and a streamed layer sees what the whole model's layer sees."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mixquant.checkpoint.locate import find
from mixquant.errors import InputError
from mixquant.integrations.transformers.loading import load_tokenizer
from mixquant.kernels.dense import use_fastest_linear_
from mixquant.offline import calibration_text, fold
from mixquant.offline.calibrate import InputStatistics, LayerStream
from mixquant.offline.calibration_text import Texts
from mixquant.offline.groups import Group
from mixquant.offline.source import Source
from mixquant.policy import Policy
from mixquant.tasks import generate
from tests.conftest import seeded
from tests.offline.checkpoints import chats, outlier_model, save

POLICY = Policy(prefill="nvfp4")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(find("demo"))


@pytest.fixture(scope="module")
def sequences() -> list[Tensor]:
    """Two of one length, a shorter one at the end."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 512, (1, length), generator=generator) for length in (40, 40, 24)]


# Text


def test_chats_go_through_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = calibration_text.read(str(chats(tmp_path / "chats.jsonl", 1)), tokenizer, 512, 10_000)
    assert tokenizer.decode(found.sequences[0][0]) == (
        "<|im_start|>user\nAdd 0 and 0.<|im_end|>\n<|im_start|>assistant\n0<|im_end|>\n"
    )


def test_long_text_is_cut_and_nothing_is_lost(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = " ".join(str(n) for n in range(300))
    (tmp_path / "long.txt").write_text(text)
    found = calibration_text.read(str(tmp_path / "long.txt"), tokenizer, 64, 10_000)
    assert {part.shape[1] for part in found.sequences[:-1]} == {64}
    assert tokenizer.decode(torch.cat(found.sequences, 1)[0]) == text + tokenizer.eos_token


def test_only_as_many_tokens_as_are_needed(tokenizer: PreTrainedTokenizerBase) -> None:
    found = calibration_text.read("agents", tokenizer, 3072, 5_000)
    assert found.tokens == 5_000
    assert [part.shape[1] for part in found.sequences] == [2048, 2048, 904]
    assert found.to_dict()["sha256"] != calibration_text.read("agents", tokenizer, 3072, 5_001).to_dict()["sha256"]


def test_the_ladder_of_calibration_is_no_evaluation_example() -> None:
    calibrated = [document.messages for _, document in itertools.islice(calibration_text._agents(), 3, 30)]
    examples = [generate("lookup", 0, seed, 0) for seed in (calibration_text.SEED, 0, 1, 2, 3, 7, 100, 101, 102)]
    used = [[*e.prompt, {"role": "assistant", "content": e.reference}] in calibrated for e in examples]
    assert used == [True] + [False] * 8


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", b"", "holds 0 tokens, and 16 are the fewest to calibrate with"),
        ("a.jsonl", b"\n\n", "holds 0 tokens"),
        ("a.txt", b"short", r"holds \d tokens"),
        ("a.txt", "A text of some length.".encode("utf-16-le"), "a.txt holds NUL characters"),
        ("a.jsonl", b'{"text": "a\\ud800b"}\n', "line 1 of .*a.jsonl holds NUL characters or halves of surrogate"),
        ("a.jsonl", b'[{"role": "user", "content": "a\\ud800b"}]\n', "line 1 of .*a.jsonl holds NUL"),
        ("a.jsonl", b'[{"role": "user", "content": null}]\n', "message 1 of line 1 .* has neither content nor tool"),
        ("a.json", b'{"messages": [{"role": "user"}]}', "message 1 of .*a.json has neither content nor tool calls"),
        ("a.json", b'[{"text": "good"}, {"prompt": "x"}]', "item 2 of .*a.json holds no chat"),
        ("a.json", b"{", "a.json is not valid JSON"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "is not UTF-8 text"),
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', r"line 2 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", b'{"text": "good"}\n\n{"prompt": "x"}\n', r"line 3 of .*a.jsonl holds no chat"),
        ("a.jsonl", b'{"messages": []}\n', r"line 1 of .*a.jsonl holds no chat"),
        (
            "a.jsonl",
            b'[{"role": "user", "content": {"a": 1}}]\n',
            r"message 1 of line 1 of .* has content that is neither text",
        ),
    ],
)
def test_unsupported_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        calibration_text.read(str(tmp_path / name), tokenizer, 512, 1_000)


def test_tools_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find("demo"))
    tokenizer.chat_template = "{{ messages[0]['content'] }} may call {{ tools[0]['function']['name'] if tools }} " * 4
    tool = {"type": "function", "function": {"name": "multiply"}}
    chat = {"messages": [{"role": "user", "content": "What is six times seven?"}]}
    texts = []
    for name, document in (("with.json", chat | {"tools": [tool]}), ("without.json", chat)):
        (tmp_path / name).write_text(json.dumps(document))
        found = calibration_text.read(str(tmp_path / name), tokenizer, 512, 1_000)
        texts.append(tokenizer.decode(found.sequences[0][0]))
    assert [text.count("may call multiply") for text in texts] == [4, 0]


def test_a_chat_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(find("demo"))
    tokenizer.chat_template = "{{ raise_exception('no users, please') }}"
    (tmp_path / "a.json").write_text(json.dumps(CHAT))
    with pytest.raises(InputError, match=r"a.json: the chat template refuses it \(no users, please\): mend it"):
        calibration_text.read(str(tmp_path / "a.json"), tokenizer, 512, 1_000)


CHAT = {"messages": [{"role": "user", "content": "Add 2 and 3, and say the sum in one word."}]}


@pytest.mark.parametrize("value", [CHAT, CHAT["messages"], [CHAT, CHAT["messages"]], [{"text": "a b c " * 20}]])
def test_json_files_hold_what_lines_hold(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, value: Any) -> None:
    several = isinstance(value, list) and value is not CHAT["messages"]
    (tmp_path / "a.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, value if several else [value])), encoding="utf-8-sig")
    whole, lines = (
        calibration_text.read(str(tmp_path / name), tokenizer, 512, 1_000) for name in ("a.json", "a.jsonl")
    )
    assert whole.to_dict()["sha256"] == lines.to_dict()["sha256"]
    assert whole.tokens >= 16


@pytest.mark.parametrize(
    ("lengths", "counted"),
    [
        ([40, 40, 24], [40, 40, 11]),  # an eighth
        ([2048, 2048, 1], [2048, 1793, 0]),  # 256 at most, wherever the sequences end
        ([4096], [3840]),
        ([16], [14]),
    ],
)
def test_the_end_of_the_stream_is_held_out(lengths: list[int], counted: list[int]) -> None:
    found = Texts("test", [torch.zeros(1, length, dtype=torch.int64) for length in lengths])
    assert found.counted == counted
    assert sum(counted) + found.held_out == found.tokens


def test_a_file_that_is_not_there(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=r"no-such.txt cannot be read .*: name a text or JSONL file"):
        calibration_text.read("no-such.txt", tokenizer, 512, 1_000)


# Layers


@contextmanager
def inputs_of(model: PreTrainedModel, names: list[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the named linear layers read, row by row, in float32."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def note(name: str, args: tuple[Tensor, ...]) -> None:
        seen[name].append(args[0].flatten(0, -2).float())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args))
        for name in names
    ]
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def expected(model: PreTrainedModel, groups: list[Group], sequences: list[Tensor]) -> dict[str, list[Tensor]]:
    use_fastest_linear_(model, CPU)
    with inputs_of(model, [group.layers[0] for group in groups]) as seen:
        for ids in sequences:
            model(ids, use_cache=False)
    return seen


def stream(folder: Path, sequences: list[Tensor]) -> dict[Group, InputStatistics]:
    source = Source.open(find(folder), POLICY)
    with LayerStream(source, Texts("test", sequences), CPU) as layers:
        return {g: s for unit in source.units if unit.name for g, s in layers.advance(unit, hessians=True).items()}


PER_LAYER = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 16, "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512,
}  # fmt: skip
MAMBA = {
    "head_dim": 16,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_expand": 1,
}
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": 16}, "gemma2": {"head_dim": 16, "sliding_window": 16},
    "phi3": {"pad_token_id": 0}, "gpt_neox": {"num_key_value_heads": None},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gemma3n_text": PER_LAYER | {"laurel_rank": 16, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": PER_LAYER | {"global_head_dim": 16},
    "falcon_h1": MAMBA, "bamba": MAMBA | {"attn_layer_indices": [1]},
}  # fmt: skip
"""The last four hand more than hidden states to their layers: embeddings of each token for each layer, keys and values
of an earlier layer, masks of two kinds."""


@pytest.mark.parametrize("family", ["qwen3", *FAMILIES])
def test_statistics_are_those_of_the_whole_model(
    family: str, folder: Path, sequences: list[Tensor], tmp_path: Path
) -> None:
    if family != "qwen3":
        folder = tiny(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = stream(folder, sequences)
    seen = expected(model, list(found), sequences)
    once = {group: s for group, s in found.items() if len(seen[group.layers[0]]) == len(sequences)}
    assert len(once) > len(found) / 2, "Gemma 3n calls its routers twice"
    for group, statistics in once.items():
        rows, held_out = torch.cat(seen[group.layers[0]]).split([91, 13])
        assert statistics.tokens == 91
        assert torch.equal(statistics.amax, rows.abs().amax(0)), group.layers
        assert torch.allclose(statistics.second_moment, rows.square().mean(0), rtol=1e-5)
        assert torch.allclose(statistics.hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        assert torch.equal(statistics.held_out, held_out)
    other = expected(model, list(found), sequences[1:])
    assert any(not torch.equal(s.amax, torch.cat(other[g.layers[0]]).abs().amax(0)) for g, s in found.items())


def tiny(family: str, folder: Path) -> Path:
    """A small model of another architecture."""
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    } | FAMILIES[family]  # fmt: skip
    config = AutoConfig.for_model(family, **{key: value for key, value in sizes.items() if value is not None})
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    seeded(model).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_folded_statistics_are_those_of_the_folded_model(folder: Path, sequences: list[Tensor]) -> None:
    """And the folded model computes the same, bit for bit."""
    statistics = stream(folder, sequences)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    before = model(sequences[0]).logits
    tensors = dict(model.named_parameters())
    for group in statistics:
        with torch.no_grad():
            factors = fold.factors(tensors, group, statistics[group].second_moment)
            assert (factors != 1).any()
            fold.apply_(tensors, group, factors)
        statistics[group] = statistics[group].folded(factors)
    assert torch.equal(model(sequences[0]).logits, before)
    seen = expected(model, list(statistics), sequences)
    for group, folded in statistics.items():
        rows, held_out = torch.cat(seen[group.layers[0]]).split([91, 13])
        assert torch.equal(folded.amax, rows.abs().amax(0))
        assert torch.allclose(folded.hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
        assert torch.equal(folded.held_out, held_out)


def test_activations_that_are_not_finite_name_their_layer(sequences: list[Tensor], tmp_path: Path) -> None:
    model = outlier_model()
    model.model.layers[1].post_attention_layernorm.weight.data[5] = torch.inf
    with pytest.raises(InputError, match=r"The input of model.layers.1.mlp.gate_proj holds NaN or Inf"):
        stream(save(model, tmp_path), sequences)


def test_held_out_tokens_that_alone_are_not_finite_name_the_layer(sequences: list[Tensor], tmp_path: Path) -> None:
    model = outlier_model()
    model.model.embed_tokens.weight.data[511] = torch.inf
    folder = save(model, tmp_path)
    last = sequences[-1].clone()
    last[0, -1] = 511
    with pytest.raises(InputError, match=r"The input of model.layers.0.self_attn.q_proj holds NaN or Inf"):
        stream(folder, [*sequences[:-1], last])
    assert stream(folder, sequences), "without that token nothing is wrong"


def test_one_sequence_serves_both_ends(folder: Path, sequences: list[Tensor]) -> None:
    """And what it holds out, the statistics have not seen."""
    changed = sequences[0].clone()
    changed[0, -5:] = 1
    found, other = (stream(folder, [ids]) for ids in (sequences[0], changed))
    for one, two in zip(found.values(), other.values(), strict=True):
        assert one.tokens == two.tokens == 35
        assert torch.equal(one.second_moment, two.second_moment)
        assert one.held_out.shape[0] == 5
        assert not torch.equal(one.held_out, two.held_out)
