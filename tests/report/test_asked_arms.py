"""Arms of any policy in a report: colours and lines of their own, their tails, their chance, the easier reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixquant.report import palette, render

from . import sample
from .rendering import curves, text


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    """A run with arms of any policy, an easier reading, and a second draw of phase's error."""
    return sample.asked_results()


def test_arms_of_any_policy_have_colours_lines_and_their_policy(asked: dict[str, Any], tmp_path: Path) -> None:
    path = sample.save(asked, tmp_path / "asked.json")
    shown = text(tmp_path, path.name)
    assert "Policy of tail16: prefill nvfp4, decode bf16, tail 16" in shown
    assert "Policy of &lt;b>: prefill nvfp4, decode bf16, tail 64, weights of some/folder" in shown
    html = render([path], Path("report.html")).decode()
    assert html.count("var(--other-1)") > 3
    assert "var(--tail16)" not in html
    assert "<b>" not in html
    names = palette.names(asked["arms"])
    assert names["tail16"] == "other-1" != names["<b>"]
    assert names["phase"] == "phase"


def test_a_curve_by_tail_where_arms_differ_in_nothing_else(asked: dict[str, Any], tmp_path: Path) -> None:
    sample.save(asked, tmp_path / "asked.json")
    (line,) = curves(tmp_path, "Divergence by tail", "asked.json").lines
    assert line.arm == "phase"
    tails = {1: "phase", 16: "tail16", 128: "tail128"}
    means = [asked["arms"][arm]["divergence"]["kld_mean"] for arm in tails.values()]
    assert [(point.x, point.y) for point in line.points] == list(zip([1, 5, 8], means, strict=True))


def test_uniform_over_the_arm_is_drawn_with_its_band(asked: dict[str, Any], tmp_path: Path) -> None:
    sample.save(asked, tmp_path / "asked.json")
    chart = curves(tmp_path, "Uniform over the arm", "asked.json")
    assert [line.arm for line in chart.lines] == ["phase", "decode-only", "tail16", "tail128", "<b>"]
    for point, row in zip(chart.lines[0].points, asked["along"]["phase"]["ratios"], strict=True):
        assert (point.y, point.band) == (row["ratio"], (row["low"], row["high"]))


def test_the_easier_reading_and_the_second_draw_are_tables(asked: dict[str, Any], tmp_path: Path) -> None:
    sample.save(asked, tmp_path / "asked.json")
    shown = text(tmp_path, "asked.json")
    assert "| Easier reading |" in shown
    nearly = asked["arms"]["phase"]["nearly"]
    assert f"{100 * nearly['accuracy']:.1f} ± {100 * nearly['se']:.1f} %" in shown
    draw = asked["arms"]["phase"]["redraw"]
    assert f"{100 * draw['share']:.1f} ± " in shown
    control = text(tmp_path, sample.save(sample.results(limit=3), tmp_path / "plain.json").name)
    assert "Easier reading" not in control
    assert "Another draw" not in control
