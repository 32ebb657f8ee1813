"""Quantiles and ratios of known samples, and files that hold no results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from mixquant.bench.results import Ratio, Row, is_bench, quantile, ratios, read, times
from mixquant.bench.summary import lines, printed
from mixquant.errors import InputError

from . import sample
from .sample import row


@pytest.mark.parametrize("share", [0, 0.5, 0.9, 0.99, 1])
@pytest.mark.parametrize("values", [[3.0], [4.0, 1.0, 2.0], [float(i * i % 17) for i in range(100)]])
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(numpy.quantile(values, share)))


def test_times_of_a_known_sample() -> None:
    found = times([5.0, 1.0, 3.0])
    assert found is not None
    assert (found.p50, found.low, found.high, found.n) == (3, 1, 5, 3)
    assert found.p99 == pytest.approx(4.96)
    assert times([]) is None


def found(*rows: Row) -> dict[tuple[str, str], Ratio]:
    return {(ratio.arm, ratio.of): ratio for ratio in ratios(rows)}


def test_ratios_are_of_medians_with_the_span_of_paired_turns() -> None:
    pairs = found(row("bf16", [10, 20, 30]), row("phase", [9, 10, 33]))
    assert list(pairs) == [("phase", "bf16")]
    ratio = pairs["phase", "bf16"]
    assert ratio.time == pytest.approx(0.5)
    assert (ratio.low, ratio.high) == (pytest.approx(0.5), pytest.approx(1.1))


def test_every_stock_arm_is_a_yardstick_of_the_others() -> None:
    pairs = found(row("bf16", [10]), row("vllm:fp8", [8]), row("phase", [9]))
    assert set(pairs) == {
        ("bf16", "vllm:fp8"),
        ("vllm:fp8", "bf16"),
        ("phase", "bf16"),
        ("phase", "vllm:fp8"),
    }
    assert pairs["phase", "vllm:fp8"].time == pytest.approx(9 / 8)


def test_a_repeated_yardstick_is_the_last_one_before() -> None:
    rows = [row("bf16", [10], session=0), row("phase", [9], session=1), row("bf16", [20], session=2)]
    rows += [row("late", [9], session=3)]
    assert found(*rows)["phase", "bf16"].time == pytest.approx(0.9)
    assert found(*rows)["late", "bf16"].time == pytest.approx(0.45)


def test_other_cases_and_emulated_arms_have_no_ratio() -> None:
    assert ratios([row("bf16", [10]), row("phase", [9], case="another")]) == []
    assert ratios([row("bf16", [10]), row("phase", [])]) == []


def test_figures_stand_side_by_side() -> None:
    results = sample.results()
    assert [line.case for line in lines(results)][:2] == ["2,048 tokens", "8,192 tokens"]
    said = "\n".join(printed(results))
    assert "| prompts: 8,192 tokens | 220.00 | 150.00 (0.68) | 165.00 (0.75) | emulated | " in said
    assert "gone did not run: no such kernel" in said


def saved(folder: Path, document: Any) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps(document))
    return path


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(sample.results().to_json())
    assert is_bench(path)
    assert read(path) == sample.results()


def test_files_that_are_no_results(tmp_path: Path) -> None:
    assert not is_bench(saved(tmp_path, {"arms": {}}))
    assert not is_bench(saved(tmp_path, []))
    assert not is_bench(tmp_path / "none.json")
    whole = json.loads(sample.results().to_json())
    with pytest.raises(InputError, match="rows: Field required"):
        read(saved(tmp_path, {key: value for key, value in whole.items() if key != "rows"}))
    with pytest.raises(InputError, match=r"rows\.0\.batch"):
        read(saved(tmp_path, whole | {"rows": [whole["rows"][0] | {"batch": "1"}]}))
