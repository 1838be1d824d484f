"""Charts as inline SVG, drawn for a width of 480 units: readable on a phone, and two side by side on a
desktop.

Colours are classes (s0, s1, ...) that the page's style sheet defines for light and dark mode. Shapes differ
too, so that colours are not needed.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from markupsafe import Markup, escape

WIDTH = 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 22, 34
_HEAD = 28  # height of a group's title
_LABELS, _MOST_LABELS, _CHARACTER = 108, 210, 8  # widths: of the labels of rows, and of a character
Curve = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: heads, and rows whose first cell is a head too.

    tones: "mean" or "bad", or both, by the number of a row.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    tones: Mapping[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart.

    - words: a sentence that says what it shows
    - drawings: (label, note, drawing) of each chart; none, one, or several small ones
    - table: the same data as a table
    - legend: the number of each series, which decides its colour and mark
    - open_table: the table is shown beside the chart; else a click shows it
    - is_folded: a click shows the whole figure
    """

    name: str
    title: str
    words: str
    drawings: Sequence[tuple[str, str, Markup]]
    table: Table
    legend: Mapping[str, int] = dataclasses.field(default_factory=dict)
    open_table: bool = False
    is_folded: bool = False

    @property
    def is_wide(self) -> bool:
        """True if the figure has the whole width of the page."""
        return self.open_table or len(self.drawings) > 1


def number(value: float) -> str:
    """A number for people: about three digits; thousands with k, M, G."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` or less to `high` or more, about `count` of them: their steps are 1, 2 or 5
    times a power of ten.
    """
    if not high > low:
        high = low + 1.0
    # The step is the next of 1, 2 or 5 times a power of ten.
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    # The tolerances here keep a value that is a tick, up to rounding, from adding one more.
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(multiple * step, 12) for multiple in range(first, last + 1)]


def averaged(curve: Curve, most: int) -> list[tuple[float, float]]:
    """A curve as at most `most` points, each the mean of neighbours."""
    size = max(1, math.ceil(len(curve) / most))
    points = []
    for start in range(0, len(curve), size):
        group = curve[start : start + size]
        points.append((sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)))
    return points


def lines(
    curves: Mapping[str, Curve],
    series: Mapping[str, int],
    x_label: str,
    y_label: str,
    raw: Mapping[str, Curve] = MappingProxyType({}),
) -> Markup:
    """Curves on one axis; the curves of `raw` are drawn thin, below the others."""
    height = 280
    points = list(itertools.chain.from_iterable(curves.values()))
    last, values = max(x for x, _ in points), [y for _, y in points]
    # The axis of steps ends with the last one, not with a tick: else a part of the width would be empty. Thin
    # curves do not count for the other axis: their peaks would flatten the means.
    xs, ys = ticks(0, last), ticks(min(values), max(values))
    plot = _Plot((xs[0], last or 1), (ys[0], ys[-1]), height)
    parts = [plot.grid(xs, ys, x_label, y_label)]
    # SVG draws in order: the thin curves come first, below the means.
    for name, curve in raw.items():
        parts.append(f'<polyline class="raw s{series[name]}" points="{plot.path(curve)}"/>')
    for name, curve in curves.items():
        parts.append(
            f'<polyline class="line s{series[name]}" '
            f'points="{plot.path(curve)}"><title>{escape(name)}</title></polyline>'
        )
    return _svg("".join(parts), WIDTH, height)


def spark(curve: Curve, width: int = 150, height: int = 44) -> Markup:
    """A curve without axes."""
    low, high = min(y for _, y in curve), max(y for _, y in curve)
    last = max(x for x, _ in curve) or 1
    span = (high - low) or 1

    def at(x: float, y: float) -> str:
        return f"{2 + (width - 6) * x / last:.1f},{3 + (height - 6) * (high - y) / span:.1f}"

    end = at(*curve[-1]).split(",")
    path = " ".join(at(x, y) for x, y in curve)
    return _svg(
        f'<polyline class="line s3" points="{path}"/><circle class="dot s3" cx="{end[0]}" cy="{end[1]}" '
        'r="2.5"/>',
        width,
        height,
    )


def dots(
    groups: Mapping[str, Mapping[str, Sequence[float | None]]],
    series: Mapping[str, int],
    unit: str,
    marks: Mapping[str, float],
) -> Markup:
    """For each row, a dot of each series on one axis, joined by a line; rows are in groups.

    marks: vertical lines by their labels.
    """
    values = [*marks.values()]
    for rows in groups.values():
        for row in rows.values():
            values += [value for value in row if value is not None]
    # A task may have no language that is known here.
    if not values:
        return Markup("")
    table = _Rows(groups, 20, ticks(min(values), max(values)), unit)
    parts = [table.grid()]
    for label, value in marks.items():
        x, title = table.at(value), f"<title>{escape(label)}</title>"
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{table.bottom}">{title}</line>'
        )
    for label, row, middle in table.rows():
        present = []
        for name, value in zip(series, row, strict=True):
            if value is not None:
                present.append((table.at(value), value, name))
        if present:
            left, right = min(present)[0], max(present)[0]
            parts.append(f'<line class="join" x1="{left:.1f}" x2="{right:.1f}" y1="{middle}" y2="{middle}"/>')
        # The first series is drawn last: it is a ring, which does not hide the others.
        for x, value, name in reversed(present):
            parts.append(shape(series[name], x, middle, f"{label}, {name}: {value:.4g}"))
    return _svg("".join(parts), WIDTH, table.height)


def shape(series: int, x: float, y: float, label: str = "") -> str:
    """The mark of a series by its number: ring, diamond, square or disc."""
    title = f"<title>{escape(label)}</title>" if label else ""
    kind = f'class="dot s{series}"'
    match series % 4:
        case 0:
            return f'<circle class="ring s{series}" cx="{x:.1f}" cy="{y:.1f}" r="5">{title}</circle>'
        case 1:
            return f'<path {kind} d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z">{title}</path>'
        case 2:
            return f'<rect {kind} x="{x - 3.7:.1f}" y="{y - 3.7:.1f}" width="7.4" height="7.4">{title}</rect>'
        case _:
            return f'<circle {kind} cx="{x:.1f}" cy="{y:.1f}" r="4.6">{title}</circle>'


def bars(groups: Mapping[str, Mapping[str, Sequence[float]]], series: Mapping[str, int], unit: str) -> Markup:
    """For each row, a horizontal bar of each series, from zero; rows are in groups."""
    thick = 8
    values: list[float] = []
    for rows in groups.values():
        values += itertools.chain.from_iterable(rows.values())
    highest = max(values, default=0.0) or 1.0
    table = _Rows(groups, max(18, thick * len(series) + 6), ticks(0, highest), unit)
    parts = [table.grid()]
    for label, row, middle in table.rows():
        for index, (name, value) in enumerate(zip(series, row, strict=True)):
            top, width = middle + (index - len(series) / 2) * thick, max(0.0, table.at(value) - table.at(0))
            title = f"<title>{escape(f'{label}, {name}: {value:.4g}')}</title>"
            size = f'x="{table.at(0)}" y="{top:.1f}" width="{width:.1f}" height="{thick - 1}"'
            parts.append(f'<rect class="bar s{series[name]}" {size}>{title}</rect>')
    return _svg("".join(parts), WIDTH, table.height)


def layers(sources: Sequence[int], new: Mapping[int, str], depth: int) -> Markup:
    """A deeper model beside its source model, with the input at the bottom: the source of each layer, and a
    word on each new layer.
    """
    count = len(sources)
    # A deep model is drawn with half the height for a layer, and a number for every tenth one.
    pitch = 20 if count <= 48 else 10
    height = count * pitch + 46
    # The source model is centered beside the deeper one.
    offset = (count - depth) * pitch / 2
    bottom = height - 22

    def box(x: float, layer: int, kind: str, lift: float = 0.0) -> str:
        top = bottom - (layer + 1) * pitch - lift + 2
        return f'<rect class="layer {kind}" x="{x}" y="{top:.1f}" width="100" height="{pitch - 4}" rx="3"/>'

    def middle(layer: int, lift: float = 0.0) -> float:
        return bottom - (layer + 0.5) * pitch - lift

    parts = [
        f'<text class="axis" x="10" y="12">before: {depth}</text>',
        f'<text class="axis" x="230" y="12">after: {count}</text>',
    ]
    for x in (60, 280):
        parts.append(f'<text class="tick" x="{x}" y="{height - 6}" text-anchor="middle">input</text>')
    every = 1 if pitch == 20 else 10
    for layer in range(depth):
        parts.append(box(10, layer, "kept", offset))
        if layer % every == 0:
            parts.append(
                f'<text class="tick" x="60" y="{middle(layer, offset) + 4:.1f}" '
                f'text-anchor="middle">{layer}</text>'
            )
    # A curve from each layer's source to the layer, with a tip at its end.
    for target, source in enumerate(sources):
        start, end, kind = middle(source, offset), middle(target), "new" if target in new else "kept"
        parts.append(
            f'<path class="from {kind}" d="M110 {start:.1f}C170 {start:.1f} 170 {end:.1f} 226 {end:.1f}"/>'
        )
        parts.append(f'<path class="tip {kind}" d="M230 {end:.1f}l-7 -3.5v7z"/>')
        parts.append(box(230, target, kind))
        if target in new:
            parts.append(f'<text class="label" x="338" y="{end + 4:.1f}">{escape(new[target])}</text>')
        if target % every == 0 or (target in new and every == 1):
            parts.append(
                f'<text class="tick {kind}" x="280" y="{end + 4:.1f}" text-anchor="middle">{target}</text>'
            )
    return _svg("".join(parts), WIDTH, height)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows in groups, one below the other, on a common horizontal axis."""

    groups: Mapping[str, Mapping[str, Any]]
    pitch: int
    xs: Sequence[float]
    unit: str

    @property
    def height(self) -> int:
        rows = sum(map(len, self.groups.values()))
        return _HEAD * len(self.groups) + self.pitch * rows + _BOTTOM

    @property
    def bottom(self) -> int:
        return self.height - _BOTTOM + 4

    @property
    def left(self) -> int:
        """The width of the labels."""
        labels = itertools.chain.from_iterable(self.groups.values())
        longest = max(map(len, labels), default=0)
        return min(max(_LABELS, _CHARACTER * longest), _MOST_LABELS)

    def at(self, value: float) -> float:
        return self.left + (value - self.xs[0]) * (WIDTH - self.left - 16) / ((self.xs[-1] - self.xs[0]) or 1)

    def rows(self) -> Iterator[tuple[str, Any, float]]:
        """The label, the values and the vertical middle of each row."""
        y = 0.0
        for rows in self.groups.values():
            y += _HEAD
            for label, row in rows.items():
                yield label, row, y + self.pitch / 2
                y += self.pitch

    def grid(self) -> str:
        grid_lines, numbers = [], []
        for x in self.xs:
            across = f"{self.at(x):.1f}"
            grid_lines.append(f'<line class="grid" x1="{across}" x2="{across}" y1="4" y2="{self.bottom}"/>')
            numbers.append(
                f'<text class="tick" x="{across}" y="{self.bottom + 14}" '
                f'text-anchor="middle">{number(x)}</text>'
            )
        # SVG draws in this order: the lines come first, so that all else is drawn over them.
        parts = [*grid_lines, *numbers]
        center = (self.left + WIDTH) / 2
        parts.append(
            f'<text class="axis" x="{center:.0f}" y="{self.height - 3}" '
            f'text-anchor="middle">{escape(self.unit)}</text>'
        )
        y = 0
        for group, rows in self.groups.items():
            parts.append(f'<text class="group" x="0" y="{y + _HEAD - 9}">{escape(group)}</text>')
            y += _HEAD + self.pitch * len(rows)
        for label, _, middle in self.rows():
            parts.append(
                f'<text class="label" x="{self.left - 9}" y="{middle + 4}" '
                f'text-anchor="end">{escape(label)}</text>'
            )
        return "".join(parts)


def _svg(inside: str, width: int, height: float) -> Markup:
    # Hidden from screen readers: the table below the chart has the same data.
    return Markup(
        f'<svg viewBox="0 0 {width} {height:.0f}" aria-hidden="true" focusable="false">{inside}</svg>'
    )


@dataclasses.dataclass(frozen=True)
class _Plot:
    """A plot area: the ranges of x and y, and its height."""

    x: tuple[float, float]
    y: tuple[float, float]
    height: int

    def at(self, x: float, y: float) -> tuple[float, float]:
        # Fractions of the width and of the height; an empty range counts as 1. Thin curves may leave the
        # range: they are drawn along its edge.
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        high = self.height - _TOP - _BOTTOM
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), _TOP + (1 - min(max(up, 0.0), 1.0)) * high

    def path(self, curve: Curve) -> str:
        return " ".join("{:.1f},{:.1f}".format(*self.at(x, y)) for x, y in curve)

    def grid(self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str) -> str:
        bottom = self.height - _BOTTOM
        parts = []
        for y in ys:
            height = self.at(self.x[0], y)[1]
            parts.append(
                f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
            )
            parts.append(
                f'<text class="tick" x="{_LEFT - 6}" y="{height + 4:.1f}" '
                f'text-anchor="end">{number(y)}</text>'
            )
        for x in xs:
            if x <= self.x[1]:
                across = self.at(x, self.y[0])[0]
                parts.append(
                    f'<text class="tick" x="{across:.1f}" y="{bottom + 14}" '
                    f'text-anchor="middle">{number(x)}</text>'
                )
        center = (_LEFT + WIDTH) / 2
        parts.append(
            f'<text class="axis" x="{center:.0f}" y="{self.height - 3}" '
            f'text-anchor="middle">{escape(x_label)}</text>'
        )
        parts.append(f'<text class="axis" x="4" y="12">{escape(y_label)}</text>')
        return "".join(parts)
