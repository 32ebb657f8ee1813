"""Engines that must not start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.vllm.engines import engine


def refused(words: str, folder: Path, policy: Mapping[str, Any] | None, **options: Any) -> None:
    """Assert that no engine starts, and that the error says why; `words` is a regular expression.

    Where vLLM builds its configuration it wraps what is raised in an error of its own, which quotes the sentence.
    """
    with pytest.raises(ValueError, match=words):
        engine(folder, policy, **options)
