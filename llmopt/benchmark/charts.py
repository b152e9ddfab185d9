"""Charts of the report: a strip of samples, a stacked bar, columns of layers, the roofline.

Colours come from the page's style sheet, and no script is needed. Every value that a chart
encodes as position or length also stands in the text next to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

COLOURS: Final = 6  # the largest parts; the others share a grey
_DENSE: Final = 60  # more dots than this overlap


def strip(metric: Mapping[str, Any], low: float, high: float) -> str:
    """Return a strip plot of the samples between ``low`` and ``high``, median marked."""
    span = high - low or 1.0

    def position(value: float) -> str:
        return f"{100 * (value - low) / span:.2f}%"

    marks = []
    if metric["interval_95"]:
        start, end = metric["interval_95"]
        width = 100 * (end - start) / span
        marks.append(f'<u style="left:{position(start)};width:{width:.2f}%"></u>')
    outliers = set(metric["outliers"])
    kind = "dense" if len(metric["samples"]) > _DENSE else ""
    for number, value in enumerate(metric["samples"]):
        mark = "out" if number in outliers else kind
        marks.append(f'<i class="{mark}" style="left:{position(value)}"></i>')
    marks.append(f'<b style="left:{position(metric["median"])}"></b>')
    return f'<div class="strip" aria-hidden="true">{"".join(marks)}</div>'


def colours(parts: Mapping[str, float]) -> dict[str, str]:
    """Return the CSS class of each part: a colour each for the largest, one for the rest."""
    ordered = sorted(parts, key=lambda part: -parts[part])
    return {part: f"p{min(number, COLOURS)}" for number, part in enumerate(ordered)}


def bar(parts: Mapping[str, float], classes: Mapping[str, str]) -> str:
    """Return a stacked bar of the shares of the parts."""
    total = sum(parts.values()) or 1.0
    segments = (
        f'<i class="{classes[part]}" style="width:{100 * seconds / total:.3f}%"'
        f' title="{escape(part or "unknown")}"></i>'
        for part, seconds in parts.items()
    )
    return f'<div class="bar" aria-hidden="true">{"".join(segments)}</div>'


def columns(layers: Sequence[Mapping[str, Any]], classes: Mapping[str, str]) -> str:
    """Return a stacked column of the parts for each layer."""
    width, height = 360.0, 100.0
    longest = max((sum(layer["parts"].values()) for layer in layers), default=0.0) or 1.0
    step = width / max(len(layers), 1)
    drawn = []
    for number, layer in enumerate(layers):
        top = height
        for part, seconds in layer["parts"].items():
            share = height * seconds / longest
            top -= share
            drawn.append(
                f'<rect class="{classes[part]}" x="{number * step + 0.5:.2f}" y="{top:.2f}"'
                f' width="{max(step - 1, 0.5):.2f}" height="{share:.2f}">'
                f"<title>layer {layer['layer']}: {escape(part)}</title></rect>"
            )
    return (
        f'<svg class="layers" viewBox="0 0 {width:.0f} {height:.0f}" preserveAspectRatio="none"'
        f' role="img" aria-label="time of each layer">{"".join(drawn)}</svg>'
    )


@dataclass(frozen=True)
class Point:
    """A phase in the roofline chart.

    Args:
        label: Number of the phase in the table next to the chart.
        intensity: Multiply-adds per byte read.
        rate: Multiply-adds per second.
        colour: CSS class.
    """

    label: str
    intensity: float
    rate: float
    colour: str


class _Scale:
    """A logarithmic axis.

    Args:
        values: Values to cover; the axis extends to full decades.
        start: Coordinate of the first decade.
        end: Coordinate of the last decade.
    """

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.first = math.floor(math.log10(min(values)))
        self.last = max(math.ceil(math.log10(max(values))), self.first + 1)
        self._start = start
        self._step = (end - start) / (self.last - self.first)

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        return self._start + self._step * (math.log10(value) - self.first)

    def decades(self) -> Iterator[float]:
        """Yield the powers of ten on the axis."""
        yield from (10.0**n for n in range(self.first, self.last + 1))


_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 342.0, 12.0, 220.0


def roofline(points: Sequence[Point], read: float, peaks: Mapping[str, float]) -> str:
    """Return a log-log chart of rate over intensity, under the limits of memory and compute.

    Args:
        points: Phases to plot.
        read: Memory bandwidth in bytes per second.
        peaks: Peak multiply-adds per second, by element type.
    """
    knees = [peak / read for peak in peaks.values()]
    x = _Scale([p.intensity for p in points] + knees, _LEFT, _RIGHT)
    y = _Scale([p.rate for p in points] + list(peaks.values()), _BOTTOM, _TOP)
    drawn = [*_grid(x, y), *_roofs(x, y, read, peaks), *_points(points, x, y)]
    return (
        '<svg class="roofline" viewBox="0 0 360 260" role="img" aria-label="roofline">'
        f"{''.join(drawn)}</svg>"
    )


def _grid(x: _Scale, y: _Scale) -> Iterator[str]:
    for value in x.decades():
        at = x(value)
        yield f'<path class="grid" d="M{at:.1f} {_TOP}V{_BOTTOM}"/>'
        yield f'<text x="{at:.1f}" y="{_BOTTOM + 14}" text-anchor="middle">{value:g}</text>'
    for value in y.decades():
        at = y(value)
        yield f'<path class="grid" d="M{_LEFT} {at:.1f}H{_RIGHT}"/>'
        yield f'<text x="{_LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{_giga(value)}</text>'
    middle = (_LEFT + _RIGHT) / 2
    yield f'<text x="{middle}" y="252" text-anchor="middle">multiply-adds per byte read</text>'
    yield f'<text x="12" y="{(_TOP + _BOTTOM) / 2}" text-anchor="middle"'
    yield f' transform="rotate(-90 12 {(_TOP + _BOTTOM) / 2})">multiply-adds per second</text>'


def _giga(value: float) -> str:
    """Return a rate with a unit prefix.

    >>> _giga(1e9), _giga(1e12), _giga(1e7)
    ('1 G', '1 T', '10 M')
    """
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:g} {unit}"
    return f"{value:g}"


def _roofs(x: _Scale, y: _Scale, read: float, peaks: Mapping[str, float]) -> Iterator[str]:
    left, right = 10.0**x.first, 10.0**x.last
    lowest = 10.0**y.first
    start = max(left, lowest / read)
    for dtype, peak in peaks.items():
        knee = peak / read
        path = f"M{x(start):.1f} {y(start * read):.1f}L{x(knee):.1f} {y(peak):.1f}H{x(right):.1f}"
        yield f'<path class="roof" d="{path}"/>'
        yield f'<text x="{_RIGHT - 2}" y="{y(peak) - 4:.1f}" text-anchor="end">{dtype}</text>'


def _points(points: Sequence[Point], x: _Scale, y: _Scale) -> Iterator[str]:
    for point in points:
        across, down = x(point.intensity), y(point.rate)
        yield f'<g class="point"><circle class="{point.colour}" cx="{across:.1f}" cy="{down:.1f}"'
        yield f' r="8"/><text x="{across:.1f}" y="{down + 4:.1f}">{escape(point.label)}</text></g>'
