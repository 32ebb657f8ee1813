"""What a report says, before it has a form: parts, sections, and blocks of words, tables, charts, texts and commands.

HTML, Markdown and PNG are three renderings of one `Page`, so they cannot disagree. Charts are data here: points with
their intervals. `charts` draws them, and every chart can also be read as a table (its `table`), which is what a screen
reader gets and what Markdown prints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from mixquant.report.numerals import FORMATS, LOWEST_KLD, NONE, p_value, short_count, signed_points, within


@dataclass(frozen=True, kw_only=True)
class Row:
    """A table's row: its header with a tag and a note under it, its cells, and the arm whose colour it carries."""

    head: str
    cells: Sequence[str]
    arm: str | None = None
    tag: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """columns: the names of the row headers' column and of every cell's. cards: on a phone, one card for each row."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Row]
    cards: bool = False
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """band: the 95 % interval of y, None where it has none. name: what the table calls it, if not by its x."""

    x: float
    y: float
    band: tuple[float, float] | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One arm's points, one at least, in the order of x."""

    arm: str
    points: Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """unit: a key of `numerals.FORMATS`; `kld` is drawn logarithmically. ticks: (place, words) instead of numbers."""

    label: str
    unit: str
    ticks: Sequence[tuple[float, str]] = ()

    @classmethod
    def octaves(cls, label: str, starts: Iterable[int]) -> Axis:
        """A logarithmic axis of whole numbers: 0, 1, 2, 4, 8, ... stand at 0, 1, 2, 3, 4, ..., their bit lengths."""
        ticks = [(start.bit_length(), short_count(start)) for start in sorted(set(starts))]
        return cls(label=label, unit="count", ticks=ticks)

    def words(self, value: float) -> str:
        return dict(self.ticks).get(value) or FORMATS[self.unit](value)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Lines with bands. steps: constant between points. tabled: False where the section has a table of its own."""

    kind: ClassVar[str] = "chart"
    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    steps: bool = False
    tabled: bool = True

    @property
    def note(self) -> str:
        """What a logarithmic axis cannot show."""
        zero = [line.arm for line in self.lines if any(is_nothing(point.y) for point in line.points)]
        if self.y.unit != "kld" or not zero:
            return ""
        return f"{' and '.join(zero)}: left out where the divergence is zero, which a logarithmic axis cannot show."

    @property
    def summary(self) -> str:
        said = [f"{line.arm} from {self._at(line.points[0])} to {self._at(line.points[-1])}" for line in self.lines]
        return f"{self.title}. {self.y.label} by {self.x.label}: {'; '.join(said)}."

    @property
    def table(self) -> Table | None:
        """One row for each x, one column for each arm."""
        if not self.tabled:
            return None
        places = sorted({(point.x, point.name) for line in self.lines for point in line.points})
        found = [{(point.x, point.name): point for point in line.points} for line in self.lines]
        rows = [
            Row(head=name or self.x.words(x), cells=[self._cell(line.get((x, name))) for line in found])
            for x, name in places
        ]
        columns = [self.x.label, *(line.arm for line in self.lines)]
        return Table(caption=f"{self.title}: {self.y.label}", columns=columns, rows=rows)

    def _at(self, point: Point) -> str:
        return f"{self.y.words(point.y)} at {self.x.words(point.x)}"

    def _cell(self, point: Point | None) -> str:
        if point is None:
            return NONE
        return within(self.y.unit, point.y, *point.band) if point.band else self.y.words(point.y)


@dataclass(frozen=True)
class Flip:
    """An arm's answers that were right and became wrong, and the other way round, as shares of all examples."""

    arm: str
    right_to_wrong: int
    wrong_to_right: int
    n: int
    p: float | None


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Diverging bars, one row for each arm. widest: the share at the end of the axis, so that charts compare."""

    kind: ClassVar[str] = "chart"
    title: str
    rows: Sequence[Flip]
    widest: float
    note: ClassVar[str] = ""

    @property
    def summary(self) -> str:
        said = [
            f"{row.arm}: {row.right_to_wrong} right to wrong, {row.wrong_to_right} wrong to right" for row in self.rows
        ]
        return f"{self.title}, against bf16. {'; '.join(said)}."

    @property
    def table(self) -> Table:
        rows = [
            Row(
                head=row.arm,
                cells=[str(row.right_to_wrong), str(row.wrong_to_right), f"{row.n:,}", p_value(row.p)],
                arm=row.arm,
            )
            for row in self.rows
        ]
        columns = ["Arm", "Right to wrong", "Wrong to right", "Examples", "McNemar p"]
        return Table(caption=f"{self.title}, against bf16", columns=columns, rows=rows)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of one arm minus another's, with its paired 95 % interval. equal: whether that counts as none."""

    arm: str
    against: str
    mean: float
    low: float
    high: float
    outcome: str
    equal: bool


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Intervals around zero, one row for each pair. margin: the loss that is too small to matter."""

    kind: ClassVar[str] = "chart"
    title: str
    rows: Sequence[Difference]
    margin: float
    note: ClassVar[str] = "Hollow: counts as equal, as in the table. Grey: the margin, a loss too small to matter."
    table: ClassVar[None] = None

    @property
    def summary(self) -> str:
        said = [
            f"{row.arm} minus {row.against}: {signed_points(row.mean)}, "
            f"between {signed_points(row.low)} and {signed_points(row.high)}, {row.outcome}"
            for row in self.rows
        ]
        return f"{self.title}. {'; '.join(said)}."


Chart = Curves | Flips | Differences


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Charts that stand side by side."""

    kind: ClassVar[str] = "charts"
    charts: Sequence[Chart]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Names and values."""

    kind: ClassVar[str] = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Commands:
    """Lines for a shell."""

    kind: ClassVar[str] = "commands"
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Text:
    """Texts that a model read or wrote, each with its label; folded under a title."""

    title: str
    parts: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Texts:
    kind: ClassVar[str] = "texts"
    texts: Sequence[Text]


Block = Table | Charts | Facts | Commands | Texts


@dataclass(frozen=True, kw_only=True)
class Section:
    """anchor: unique within its part. lead: how to read what follows."""

    anchor: str
    title: str
    lead: str
    blocks: Sequence[Block]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one results file says. sentence: its verdict; about: what was run; details: the verdict's own."""

    name: str
    sentence: str
    about: str
    details: Sequence[str] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """The whole report. arms: the names of all, in their order."""

    title: str
    parts: Sequence[Part]
    arms: Sequence[str]

    @property
    def rows(self) -> list[Charts]:
        """All charts, those that stand side by side together, in their order."""
        blocks = [block for part in self.parts for section in part.sections for block in section.blocks]
        return [block for block in blocks if isinstance(block, Charts)]


def reproduction(lead: str, commands: Sequence[str]) -> Section:
    return Section(anchor="reproduce", title="How to reproduce", lead=lead, blocks=[Commands(lines=commands)])


def is_nothing(kld: float) -> bool:
    """Whether a divergence is only rounding."""
    return kld < LOWEST_KLD
