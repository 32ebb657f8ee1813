"""The checkpoint and the calibration text of most tests here; nobody changes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.offline.checkpoints import chats, outlier_model, save


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(outlier_model(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chats(tmp_path_factory.mktemp("text") / "chats.jsonl", 20)
