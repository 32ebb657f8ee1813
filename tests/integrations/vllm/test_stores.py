"""External KV stores: engines of one policy share their blocks, engines of different policies never do.

The store is real (vLLM's OffloadingConnector), and all engines of this process have it in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from mixquant.integrations.vllm import short_prompts
from mixquant.integrations.vllm.checkpoint import Sources
from mixquant.integrations.vllm.stores import salt
from mixquant.policy import Policy
from tests.integrations.vllm import scenarios, store
from tests.integrations.vllm.comparison import contrast
from tests.integrations.vllm.engines import CONTROL, EXACT, prompts, running, sampling
from tests.integrations.vllm.scenarios import PHASE, Run, Scenario

LENGTHS = (83, 131, 301)


@pytest.fixture(autouse=True)
def _empty_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # without it, engines of vLLM 0.26 and 0.28 share with none
    store.BLOCKS.clear()
    yield
    store.BLOCKS.clear()


def ask(folder: Path, policy: Mapping[str, Any] | None, **options: Any) -> tuple[Run, set[bytes]]:
    """Answers of an engine with the store, one prompt at a time, and the keys of the blocks that it added."""
    before = set(store.BLOCKS)
    options = {"enable_prefix_caching": False, "kv_transfer_config": store.CONFIG, **options}
    run = scenarios.run(folder, Scenario(policy, options, lengths=LENGTHS, alone=True))
    return run, set(store.BLOCKS) - before


def test_one_policy_shares_and_policies_never_meet(folder):
    """Not even with stock vLLM, which finds what stock vLLM wrote. The store keeps what all of them write."""
    writer, written = ask(folder, PHASE)
    reader, added = ask(folder, PHASE)
    assert written
    assert not added
    assert reader.cached_tokens > writer.cached_tokens
    assert contrast(writer, reader) < EXACT
    for other in (PHASE | {"tail": 4}, PHASE | {"decode": "nvfp4"}, None):
        stranger, added = ask(folder, other)
        assert len(added) == len(written)
        assert stranger.cached_tokens == writer.cached_tokens
        assert contrast(writer, stranger) > CONTROL
    assert not ask(folder, None)[1]


def test_a_users_own_salt_still_counts(folder):
    (prompt,) = prompts((131,))
    added = []
    with running(folder, PHASE, kv_transfer_config=store.CONFIG, enable_prefix_caching=False) as llm:
        for salts in ({}, {"cache_salt": "mine"}, {"cache_salt": "mine"}, {"cache_salt": "yours"}):
            before = len(store.BLOCKS)
            # vLLM writes a finished request's last blocks with the next request.
            for request in ({"prompt_token_ids": prompt, **salts}, {"prompt_token_ids": prompt[:5]}):
                llm.generate(request, sampling(4), use_tqdm=False)
            added.append(len(store.BLOCKS) - before)
    assert added == [4, 4, 0, 4]


def test_what_the_salt_depends_on():
    nvfp4, auto = Sources(Policy(prefill="nvfp4")), Sources(Policy())
    assert salt(nvfp4, "H200") == salt(nvfp4, "B200")
    assert salt(auto, "H200") != salt(auto, "B200")
    fp8, separate = (Sources(Policy(prefill="fp8", storage=storage)) for storage in ("auto", "separate"))
    assert salt(fp8, "H200") != salt(fp8, "L40S")  # the plane's codes there, others here
    assert salt(separate, "H200") == salt(separate, "L40S")
    assert salt(nvfp4, "H200") != salt(Sources(Policy(prefill="nvfp4", scales="amax")), "H200")


def test_the_salt_holds_the_min_prompt_that_is_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's default is what its number is, and a prefill server has none."""
    policies = [Policy(prefill="fp8", min_prompt=number) for number in (None, 0, short_prompts.MEASURED)]
    by_default, off, on = (salt(Sources(policy), "H200") for policy in policies)
    assert by_default == off != on
    reads = [salt(Sources(Policy(prefill="fp8", role="prefill", min_prompt=number)), "H200") for number in (None, 0)]
    monkeypatch.setattr(short_prompts, "_reads_fp8", lambda format: True)
    assert salt(Sources(policies[0]), "H200") == on
    assert {salt(Sources(Policy(prefill="fp8", role="prefill")), "H200"), *reads} == {reads[0]}
