"""What is installed, and where mixquant runs from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from mixquant import packages


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which mixquant would lie as in its own repository."""
    module = tmp_path / "src/mixquant/packages.py"
    module.parent.mkdir(parents=True)
    module.write_text("one\n")
    monkeypatch.setattr(packages, "__file__", str(module))
    return tmp_path


def git(folder: Path, *command: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    return subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True, text=True).stdout


def test_a_checkout_has_a_commit_and_says_where_it_was_changed(checkout: Path) -> None:
    assert packages.commit() is None  # installed: no repository
    git(checkout, "init", "-q")
    assert packages.commit() is None  # nothing committed
    git(checkout, "add", ".")
    git(checkout, "commit", "-qm", "one")
    head = git(checkout, "rev-parse", "--short", "HEAD").strip()
    assert packages.commit() == head
    (checkout / "src/mixquant/packages.py").write_text("two\n")
    assert packages.commit() == f"{head}-dirty"
