"""From figures with their standard errors to lines with 95 % bands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from mixquant.evaluate.metrics import Z
from mixquant.report.page import Axis, Line, Point

KLD = Axis(label="KL divergence to bf16, nats a token", unit="kld")

Mean = tuple[float | None, float | None]
"""A mean and its standard error, where there are any."""


class HasKLD(Protocol):
    """An arm, a rung, a layer, or a range of positions or prompt lengths."""

    @property
    def kld_mean(self) -> float | None: ...
    @property
    def kld_se(self) -> float | None: ...


T = TypeVar("T")


def kld_of(found: HasKLD) -> Mean:
    return found.kld_mean, found.kld_se


def lines(
    arms: Mapping[str, Sequence[T]],
    place: Callable[[T], float],
    figure: Callable[[T], Mean],
    name: Callable[[T], str] = lambda _: "",
) -> list[Line]:
    """One line, with 95 % intervals, for each arm for which a figure was measured anywhere."""
    drawn = []
    for arm, found in arms.items():
        points = [
            Point(x=place(item), y=mean, band=interval(mean, se), name=name(item))
            for item in found
            for mean, se in [figure(item)]
            if mean is not None
        ]
        if points:
            drawn.append(Line(arm=arm, points=points))
    return drawn


def interval(mean: float, se: float | None) -> tuple[float, float] | None:
    """The 95 % interval of a mean of something that is never negative; one example has none."""
    return None if se is None else (max(mean - Z * se, 0.0), mean + Z * se)
