"""`mixquant.json`, and the fingerprint by which a quantized folder knows its BF16 model."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from mixquant.checkpoint.sidecar import SIDECAR, DecodeModel, Sidecar, fingerprint, read_sidecar, write_sidecar
from mixquant.errors import InputError
from mixquant.policy import Policy


def test_what_is_written_comes_back(tmp_path):
    decode = DecodeModel("Qwen/Qwen3-8B", "main", "abc")
    written = Sidecar(Policy(prefill="nvfp4", tail=2), decode, {"scales": "search", "steps": [1, 2]})
    write_sidecar(tmp_path, written)
    assert read_sidecar(tmp_path) == written


def test_a_policy_alone(tmp_path):
    write_sidecar(tmp_path, Sidecar(Policy(prefill="int8")))
    assert list(json.loads((tmp_path / SIDECAR).read_text())) == ["policy"]
    assert read_sidecar(tmp_path).decode_model is None


def test_a_policy_without_a_tail_was_made_when_the_default_was_1(tmp_path):
    (tmp_path / SIDECAR).write_text('{"policy": {"prefill": "nvfp4"}}')
    assert read_sidecar(tmp_path).policy == Policy(prefill="nvfp4", tail=1)
    write_sidecar(tmp_path, Sidecar(Policy(prefill="nvfp4")))
    assert read_sidecar(tmp_path).policy.tail == json.loads((tmp_path / SIDECAR).read_text())["policy"]["tail"] == 32


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"policy": {}, "decode_model": {"path": "x"}}', '{"policy": null'])
def test_damaged(tmp_path, text):
    (tmp_path / SIDECAR).write_text(text)
    with pytest.raises(InputError, match=r"mixquant.json is .*: save the model again, or name a policy"):
        read_sidecar(tmp_path)


def test_a_policy_that_cannot_be_is_named_with_its_file(tmp_path):
    (tmp_path / SIDECAR).write_text('{"policy": {"prefill": "nvfp4", "tail": "x"}}')
    with pytest.raises(InputError, match=r"mixquant.json: tail is a number of prompt tokens, 0 or more, not 'x'"):
        read_sidecar(tmp_path)


def test_absent(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_sidecar(tmp_path)


def test_a_folder_inside_comes_first(tmp_path):
    (tmp_path / "decode").mkdir()
    assert DecodeModel("decode", hash="abc").located(tmp_path) == DecodeModel(str(tmp_path / "decode"), hash="abc")
    assert DecodeModel("Qwen/Qwen3-8B").located(tmp_path) == DecodeModel("Qwen/Qwen3-8B")
    assert DecodeModel("/models/qwen").located(tmp_path) == DecodeModel("/models/qwen")


def test_fingerprints_do_not_depend_on_files(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for part, kept in (("a", True), ("b", False)):
        chosen = {name: tensor for name, tensor in tensors.items() if ("mlp" in name) is kept}
        save_file(chosen, tmp_path / f"{part}.safetensors")
    assert fingerprint(tmp_path) == fingerprint(tiny_folder)


@pytest.mark.parametrize(
    ("name", "place"),
    [("model.layers.1.input_layernorm.weight", 5), ("model.layers.2.mlp.up_proj.weight", (slice(None), 7))],
)
def test_one_folded_channel_changes_it(tiny_folder, tmp_path, name, place):
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name][place] *= 2
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != fingerprint(tiny_folder)
    DecodeModel("one", hash=fingerprint(tiny_folder)).check(tiny_folder)
    with pytest.raises(InputError, match="is not the BF16 model that the quantized weights belong to: use one"):
        DecodeModel("one", hash=fingerprint(tiny_folder)).check(tmp_path)


def test_without_a_hash_any_model_will_do(tiny_folder):
    DecodeModel("one").check(tiny_folder)
