"""What a benchmark says: times by workload, and how long each arm takes over stock BF16, by length, batch and tail."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from mixquant.bench.results import Engine, Results, Times
from mixquant.bench.summary import Cell, Line, lines
from mixquant.policy import REFERENCE
from mixquant.report import page
from mixquant.report.beside import FEWEST_TAILS, TAIL
from mixquant.report.numerals import NONE, count, date, duration, kernel_words, percent, short_count
from mixquant.report.page import Axis, Block, Charts, Curves, Facts, Part, Point, Row, Section, Table, reproduction

AGAIN = "On the same machine: times differ by what the turns of one run differ by."

TITLES = {
    "agent": "Conversations of agents",
    "prompts": "Time to the first token",
    "decode": "A decode step",
    "serve": "Load on servers",
}
LEADS = {
    "agent": "The same seeded conversations for every arm, all at once: each turn goes out when the answer before it "
    "is there. First tokens of later turns are those that follow a tool's result.",
    "prompts": "Milliseconds until every prompt of a case has its first token: the median of the turns.",
    "decode": "Milliseconds between two tokens while every request of the batch writes: the median of the turns.",
    "serve": "What vLLM's own benchmark says of each server; they take turns.",
}


def name(results: Results) -> str:
    """What tells a part from others."""
    return f"{results.model}{' with dummy weights' if results.dummy else ''}: how fast"


def part(title: str, results: Results, again: str) -> Part:
    """The part of one benchmark. again: the command that makes the report."""
    found = lines(results)
    workloads = [workload for workload in TITLES if any(line.workload == workload for line in found)]
    sections = [
        _section(results, workload, [line for line in found if line.workload == workload]) for workload in workloads
    ]
    details = [f"{arm} did not run: {reason}." for arm, reason in results.missing.items()]
    started = "" if results.started is None else f", {date(results.started)}"
    return Part(
        name=title,
        sentence=sentence(results),
        about=f"{results.software} on {results.device}{', dummy weights' if results.dummy else ''}{started}",
        details=[*details, *results.notes],
        sections=[*sections, _machine(results), reproduction(AGAIN, [results.command, again])],
    )


def sentence(results: Results) -> str:
    """Every arm's time over the yardstick's, from the smallest to the greatest, by workload."""
    said = []
    for arm in results.arms:
        spans = []
        for workload in TITLES:
            ratios = [
                ratio.time
                for ratio in results.ratios
                if (ratio.workload, ratio.arm, ratio.of) == (workload, arm, results.yardstick)
                and ratio.time is not None
            ]
            if ratios:
                low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
                spans.append(f"{workload} {low if low == high else f'{low} to {high}'}")
        if spans:
            said.append(f"{arm} {', '.join(spans)}")
    stock = results.yardstick.replace(REFERENCE, "stock BF16")
    return f"Time over {stock}'s: {'; '.join(said)}." if said else f"No arm was timed beside {stock}."


def _section(results: Results, workload: str, found: list[Line]) -> Section:
    arms = [arm for arm in results.arms if any(arm in line.cells for line in found)]
    tables = (
        [*(_talks(line, arms, results.yardstick) for line in found)]
        if workload in ("agent", "serve")
        else [*_times(workload, found, arms, results.yardstick)]
    )
    charts = [chart for chart in _curves(results, workload, found, arms) if chart.lines]
    blocks: list[Block] = [Charts(charts=charts)] if charts else []
    blocks += [*tables, *_ceilings(found, arms)]
    return Section(anchor=workload, title=TITLES[workload], lead=LEADS[workload], blocks=blocks)


def _times(workload: str, found: list[Line], arms: list[str], yardstick: str) -> Iterator[Table]:
    rows = [Row(head=line.case, cells=[_time(line.cells.get(arm)) for arm in arms]) for line in found]
    caption = f"{TITLES[workload]}, ms: median of the turns; in brackets the time over {yardstick}'s, least to greatest"
    yield Table(caption=caption, columns=["Case", *arms], rows=rows)
    beside = [line for line in found if workload == "decode" and _any(line).row.ttft_ms]
    if beside:
        rows = [Row(head=line.case, cells=[_first(line.cells.get(arm)) for arm in arms]) for line in beside]
        yield Table(caption="First token of the prompt that is read meanwhile, ms", columns=["Case", *arms], rows=rows)


def _ceilings(found: list[Line], arms: list[str]) -> Iterator[Table]:
    if any(cell.row.ceiling_share is not None for line in found for cell in line.cells.values()):
        shares = [Row(head=line.case, cells=[_ceiling(line.cells.get(arm)) for arm in arms]) for line in found]
        caption = "The ceiling, ms: products, attention and reads at this device's own rates; and the share reached"
        yield Table(caption=caption, columns=["Case", *arms], rows=shares, folded=True)


def _talks(line: Line, arms: list[str], yardstick: str) -> Table:
    rows = [_talk(arm, line.cells[arm]) for arm in arms if arm in line.cells]
    columns = [
        "Arm", "All of it, s", f"Over {yardstick}'s", "First token p50, ms", "p99", "Later turns p50, ms", "p99",
        "Between tokens, ms", "Tokens/s", "Cached",
    ]  # fmt: skip
    return Table(caption=line.case, columns=columns, rows=rows, cards=True)


def _talk(arm: str, cell: Cell) -> Row:
    row = cell.row
    total = NONE if row.median is None else f"{row.median / 1e3:.2f}"
    ratio = NONE if cell.ratio is None or cell.ratio.time is None else f"{cell.ratio.time:.2f}"
    cells = [
        total, ratio, *_quantiles(row.ttft_ms), *_quantiles(row.later_ttft_ms), _ms(row.step_ms),
        count(row.tokens_per_s), percent(row.hit_rate),
    ]  # fmt: skip
    return Row(head=arm, cells=cells, arm=arm)


def _quantiles(times: Times | None) -> tuple[str, str]:
    return (_ms(times.p50), _ms(times.p99)) if times else (NONE, NONE)


def _ms(value: float | None) -> str:
    return (
        NONE if value is None else f"{value:,.2f}" if value < 20 else f"{value:,.1f}" if value < 1000 else count(value)
    )


def _time(cell: Cell | None) -> str:
    if cell is None:
        return NONE
    if cell.row.median is None:
        return "emulated"
    ratio = cell.ratio
    if ratio is None or ratio.time is None or ratio.low is None or ratio.high is None:
        return _ms(cell.row.median)
    return f"{_ms(cell.row.median)} ({ratio.time:.2f}, {ratio.low:.2f} to {ratio.high:.2f})"


def _first(cell: Cell | None) -> str:
    return NONE if cell is None or cell.row.ttft_ms is None else _ms(cell.row.ttft_ms.p50)


def _ceiling(cell: Cell | None) -> str:
    if cell is None or cell.row.ceiling_ms is None:
        return NONE
    return f"{_ms(cell.row.ceiling_ms)} ({percent(cell.row.ceiling_share)})"


def _curves(results: Results, workload: str, found: list[Line], arms: list[str]) -> Iterator[Curves]:
    """Time over BF16's by what the cases of a workload differ in."""
    if workload == "decode":
        steps = [line for line in found if not _any(line).row.new]
        yield _curve(results, "A step by its batch", "requests at once", steps, arms, lambda cell: cell.row.batch)
    if workload == "prompts":
        alone = [line for line in found if _any(line).row.batch == 1]
        new = [line for line in alone if not _any(line).row.cached]
        yield _curve(results, "Prompts alone", "prompt tokens", new, arms, lambda cell: cell.row.isl)
        for cached in sorted({_any(line).row.cached for line in alone} - {0}):
            turns = [line for line in alone if _any(line).row.cached == cached]
            label = f"new tokens on {short_count(cached)} cached"
            yield _curve(results, "Short turns", label, turns, arms, lambda cell: cell.row.new)
        yield from _tails(results, found)


def _over(results: Results) -> Axis:
    return Axis(label=f"time over {results.yardstick}'s", unit="times")


def _any(line: Line) -> Cell:
    return next(iter(line.cells.values()))


def _curve(
    results: Results, title: str, label: str, found: list[Line], arms: list[str], place: Callable[[Cell], int]
) -> Curves:
    drawn = [page.Line(arm=arm, points=points) for arm in arms if (points := _points(arm, found, place))]
    x = Axis.octaves(label, [place(_any(line)) for line in found])
    return Curves(title=title, x=x, y=_over(results), lines=drawn if len(found) > 1 else [], tabled=False)


def _points(arm: str, found: list[Line], place: Callable[[Cell], int]) -> list[Point]:
    cells = sorted((line.cells[arm] for line in found if arm in line.cells), key=place)
    return [point for cell in cells if (point := _point(cell, place(cell).bit_length()))]


def _point(cell: Cell, x: int) -> Point | None:
    ratio = cell.ratio
    if ratio is None or ratio.time is None or ratio.low is None or ratio.high is None:
        return None
    return Point(x=x, y=ratio.time, band=(ratio.low, ratio.high))


def _tails(results: Results, found: list[Line]) -> Iterator[Curves]:
    """What a longer tail costs: for arms that differ in nothing else, one line for each case."""
    alike: dict[str, dict[int, str]] = defaultdict(dict)
    for arm, engine in results.engines.items():
        if engine.tail is not None:
            alike[engine.engine][engine.tail] = arm
    for tails in alike.values():
        if len(tails) >= FEWEST_TAILS:
            yield _tail_chart(results, dict(sorted(tails.items())), found)


def _tail_chart(results: Results, tails: Mapping[int, str], found: list[Line]) -> Curves:
    drawn = []
    for line in found:
        cells = {tail: line.cells[arm] for tail, arm in tails.items() if arm in line.cells}
        points = [point for tail, cell in cells.items() if (point := _point(cell, tail.bit_length()))]
        if points:
            drawn.append(page.Line(arm=_short(line), points=points))
    title, x = f"What a tail costs ({next(iter(tails.values()))} and its like)", Axis.octaves(TAIL, tails)
    return Curves(title=title, x=x, y=_over(results), lines=drawn, tabled=False)


def cases(results: Results) -> list[str]:
    """Names that charts draw lines for beside arms: the cases of a tail's curve."""
    return [_short(line) for line in lines(results) if line.workload == "prompts"]


def _short(line: Line) -> str:
    """A case of prompts as the end of a line has room for it: `512 on 16K`, `16 x 2K`."""
    row = _any(line).row
    many = f"{row.batch} x " if row.batch > 1 else ""
    return f"{many}{short_count(row.new)}" + (f" on {short_count(row.cached)}" if row.cached else "")


def _machine(results: Results) -> Section:
    rows = [
        ("Model", results.model + (", weights made up" if results.dummy else "")),
        ("Device", results.device),
        ("Versions", ", ".join(f"{key} {version}" for key, version in sorted(results.versions.items()))),
        *((f"Engine of {arms}", said) for arms, said in _alike({a: _engine(e) for a, e in results.engines.items()})),
        *([("Commit", results.commit)] if results.commit else []),
        *([("Duration", duration(results.seconds))] if results.seconds is not None else []),
    ]
    kernels = {row.arm: kernel_words(row.kernels) for row in results.rows}
    rows += [(f"Kernels of {arms}", said) for arms, said in _alike(kernels)]
    lead = "What ran: a figure belongs to these engines on this machine."
    return Section(anchor="machine", title="Engines and machine", lead=lead, blocks=[Facts(rows=rows)])


def _alike(words: Mapping[str, str]) -> list[tuple[str, str]]:
    """What is said of arms, those together of which the same is said."""
    arms: dict[str, list[str]] = {}
    for arm, said in words.items():
        arms.setdefault(said, []).append(arm)
    return [(", ".join(names), said) for said, names in arms.items()]


def _engine(engine: Engine) -> str:
    """Graphs, runner, attention and memory of an engine, as far as they are known."""
    said = [engine.engine]
    if engine.graphs is not None:
        runner = f" runner {engine.runner}," if engine.runner else ""
        said.append(f"graphs {engine.graphs},{runner} attention {' + '.join(engine.attention)}")
    if engine.model_bytes is not None:
        said.append(f"model {engine.model_bytes / 2**30:,.2f} GiB")
    if engine.cache_tokens is not None:
        said.append(f"KV cache of {engine.cache_tokens:,} tokens")
    return ", ".join(said)
